// SPDX-License-Identifier: Apache-2.0

#include "team.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace stfpm_ext {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

[[maybe_unused]] std::atomic<bool> is_forked_child{false};

/// torch makes the symbols of its OpenMP runtime (libgomp, libomp or libiomp5) global, so that this needs no link to
/// it. In a forked child, the runtime's threads do not exist, and libgomp hangs.
template <class Function>
Function* openmp_function(const char* name, std::atomic<Function*>& found) {
#if defined(_WIN32) || defined(__SANITIZE_THREAD__)
  // Windows cannot look a symbol up in all libraries at once. ThreadSanitizer does not see how libgomp synchronises its
  // threads, and would report a race.
  static_cast<void>(name), static_cast<void>(found);
  return nullptr;
#else
  if (is_forked_child) return nullptr;
  Function* function = found.load(std::memory_order_relaxed);
  if (function == nullptr) {  // looked for again until torch has been imported
    function = reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
    found.store(function, std::memory_order_relaxed);
  }
  return function;
#endif
}

/// What compilers turn `#pragma omp parallel` into.
using Parallel = void(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);
std::atomic<Parallel*> parallel{nullptr};
Parallel* openmp_parallel() { return openmp_function("GOMP_parallel", parallel); }

void run_in_parallel(Parallel* parallel_region, int num_threads, const std::function<void()>& body) {
  parallel_region([](void* data) { (*static_cast<const std::function<void()>*>(data))(); },
                  const_cast<std::function<void()>*>(&body), static_cast<unsigned>(num_threads), 0);
}

/// Within a parallel region, all threads have work already.
std::atomic<int (*)()> in_parallel{nullptr};
bool is_in_parallel_region() {
  int (*const function)() = openmp_function("omp_in_parallel", in_parallel);
  return function != nullptr && function() != 0;
}

/// Whether threads begin when they are asked to. One late team is chance. After the second in a row the caller does
/// without them for a second, and for longer each time that they are late again.
class Promptness {
 public:
  bool is_given() const { return Clock::now().time_since_epoch().count() >= late_until_.load(); }

  /// `waited`: for the others, after `worked`.
  void note(Clock::duration worked, Clock::duration waited) {
    if (waited < std::max<Clock::duration>(milliseconds(1), worked / 4)) {
      late_teams_ = 0;
      pause_ = kShortestPause;
    } else if (++late_teams_ > 1) {
      late_until_ = (Clock::now() + Clock::duration(pause_)).time_since_epoch().count();
      pause_ = std::min(2 * pause_, kLongestPause);
    }
  }

 private:
  using Count = Clock::duration::rep;
  static constexpr Count kShortestPause = Clock::duration(seconds(1)).count();
  static constexpr Count kLongestPause = 16 * kShortestPause;

  // Each by itself: where two callers note at the same time, either may be right.
  std::atomic<Count> late_until_{0}, pause_{kShortestPause};
  std::atomic<int> late_teams_{0};
};

Promptness promptness;
thread_local Clock::duration waited_within{};  // a body of this thread

/// Starts threads for one call.
void start_threads(int num_threads, const std::function<void()>& body) {
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

void run_on_threads(int num_threads, const std::function<void()>& body) {
  const auto caller = std::this_thread::get_id();
  const Clock::time_point start = Clock::now();
  Clock::time_point end;
  waited_within = Clock::duration::zero();
  const std::function<void()> timed = [&] {
    body();
    if (std::this_thread::get_id() == caller) end = Clock::now();
  };
  if (Parallel* const region = openmp_parallel())
    run_in_parallel(region, num_threads, timed);
  else
    start_threads(num_threads, timed);
  promptness.note(end - start - waited_within, Clock::now() - end + waited_within);
}

#ifndef _WIN32
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });
#endif

}  // namespace

void wait_in_team(const std::function<void()>& wait) {
  const Clock::time_point start = Clock::now();
  wait();
  waited_within += Clock::now() - start;
}

void run_team(int num_threads, const std::function<void()>& body) {
  if (num_threads <= 1 || is_in_parallel_region() || !promptness.is_given()) return body();
  run_on_threads(num_threads, body);
}

void run_on_torch_threads(int num_threads, const std::function<void()>& body) {
  Parallel* const region = openmp_parallel();
  if (num_threads <= 1 || region == nullptr) return body();
  run_in_parallel(region, num_threads, body);
}

bool threads_are_late() { return !promptness.is_given(); }

}  // namespace stfpm_ext
