// SPDX-License-Identifier: Apache-2.0
//
// Picks the kernels for this machine, once.

#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace stfpm_ext {

// The best first; CMakeLists.txt compiles the same ones.
#if defined(__x86_64__)
extern const Kernels kernels_avx512, kernels_avx2, kernels_baseline;
static const Kernels* const kBuilt[] = {&kernels_avx512, &kernels_avx2, &kernels_baseline};

static bool runs_here(const Kernels* kernels) {
  __builtin_cpu_init();
  if (kernels == &kernels_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (kernels == &kernels_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return true;
}
#else
#if defined(__aarch64__)
extern const Kernels kernels_neon;
static const Kernels* const kBuilt[] = {&kernels_neon};
#else
extern const Kernels kernels_baseline;
static const Kernels* const kBuilt[] = {&kernels_baseline};
#endif
static bool runs_here(const Kernels*) { return true; }
#endif

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : kBuilt) names.emplace_back(kernels->isa);
  return names;
}

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> available;
  for (const Kernels* kernels : kBuilt)
    if (runs_here(kernels)) available.push_back(kernels);
  return available;
}

static const Kernels& choose_kernels() {
  const auto available = available_kernels();
  const char* const wanted = std::getenv("STFPM_EXT_ISA");
  if (wanted == nullptr || *wanted == '\0') return *available.front();
  std::string names;
  for (const Kernels* kernels : available) {
    if (std::string(wanted) == kernels->isa) return *kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels->isa;
  }
  throw std::invalid_argument("STFPM_EXT_ISA is '" + std::string(wanted) + "', but this machine runs: " + names);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

}  // namespace stfpm_ext
