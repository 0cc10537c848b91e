// SPDX-License-Identifier: Apache-2.0
//
// Picks the kernels for this machine, once.

#include "dispatch.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>

#if defined(__x86_64__) || defined(_M_X64)
#define STFPM_EXT_X86_64
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace stfpm_ext {

// The best first; CMakeLists.txt compiles the same ones.
#ifdef STFPM_EXT_X86_64
extern const Kernels kernels_avx512, kernels_avx2, kernels_baseline;
static const Kernels* const kBuilt[] = {&kernels_avx512, &kernels_avx2, &kernels_baseline};

// Asks CPUID itself, since __builtin_cpu_supports denies everything in builds by zig.
struct Registers {
  uint32_t eax, ebx, ecx, edx;
};

static Registers cpuid(uint32_t leaf) {
  Registers registers{};  // stay 0 where the processor does not know the leaf
#ifdef _MSC_VER
  int values[4];
  __cpuid(values, 0);
  if (leaf <= static_cast<uint32_t>(values[0])) {
    __cpuidex(values, static_cast<int>(leaf), 0);
    std::memcpy(&registers, values, sizeof registers);
  }
#else
  __get_cpuid_count(leaf, 0, &registers.eax, &registers.ebx, &registers.ecx, &registers.edx);
#endif
  return registers;
}

/// Which registers the operating system saves when it switches threads (XCR0), a bit for each kind.
static uint64_t saved_registers() {
#ifdef _MSC_VER
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low | uint64_t{high} << 32;
#endif
}

static bool has_all(uint64_t bits, std::initializer_list<int> positions) {
  for (const int position : positions)
    if ((bits >> position & 1) == 0) return false;
  return true;
}

static bool runs_here(const Kernels* kernels) {
  if (kernels == &kernels_baseline) return true;
  const Registers first = cpuid(1), seventh = cpuid(7);
  const bool has_xgetbv = has_all(first.ecx, {27});
  const uint64_t saved = has_xgetbv ? saved_registers() : 0;
  const bool runs_avx2 = has_all(saved, {1, 2})           // XMM, YMM
                         && has_all(first.ecx, {12, 28})  // FMA, AVX
                         && has_all(seventh.ebx, {5});    // AVX2
  if (kernels == &kernels_avx2) return runs_avx2;
  return runs_avx2 && has_all(saved, {5, 6, 7})      // mask registers, upper halves of ZMM, ZMM16 to 31
         && has_all(seventh.ebx, {16, 17, 30, 31});  // AVX-512 F, DQ, BW, VL
}
#else
#if defined(__aarch64__) || defined(_M_ARM64)
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
