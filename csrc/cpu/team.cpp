// SPDX-License-Identifier: Apache-2.0

#include "team.h"

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace stfpm_ext {
namespace {

/// What compilers turn `#pragma omp parallel` into; part of the ABI of libgomp, and of libomp and libiomp5.
using OpenMpParallel = void (*)(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);

#if defined(_WIN32) || defined(__SANITIZE_THREAD__)
// Windows cannot look a symbol up in all libraries at once. ThreadSanitizer does not see how libgomp synchronises its
// threads, and would report a race.
OpenMpParallel torch_parallel() { return nullptr; }
#else
std::atomic<bool> is_forked_child{false};

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });

/// torch makes the symbols of its OpenMP runtime global (libtorch_global_deps), so that this needs no link to it.
OpenMpParallel torch_parallel() {
  // In a forked child, the runtime's threads do not exist.
  if (is_forked_child) return nullptr;
  static std::atomic<OpenMpParallel> found{nullptr};  // looked for again until torch has been imported
  OpenMpParallel parallel = found.load(std::memory_order_relaxed);
  if (parallel == nullptr) {
    parallel = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.store(parallel, std::memory_order_relaxed);
  }
  return parallel;
}
#endif

void run_threads(int num_threads, const std::function<void()>& body) {
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(num_threads));  // so that nothing but the start of a thread can fail below
  try {
    for (int thread = 1; thread < num_threads; ++thread) others.emplace_back(std::cref(body));
  } catch (const std::exception&) {
    // The system grants no more threads, or no memory for one.
  }
  body();
  for (std::thread& other : others) other.join();
}

}  // namespace

void run_team(int num_threads, const std::function<void()>& body) {
  if (num_threads <= 1) return body();
  const OpenMpParallel parallel = torch_parallel();
  if (parallel == nullptr) return run_threads(num_threads, body);
  parallel([](void* data) { (*static_cast<const std::function<void()>*>(data))(); },
           const_cast<std::function<void()>*>(&body), static_cast<unsigned>(num_threads), 0);
}

}  // namespace stfpm_ext
