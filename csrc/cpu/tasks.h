// SPDX-License-Identifier: Apache-2.0
//
// Work on the positions of all levels, cut into pieces that threads take as they are free.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include "../anomaly_map.h"

namespace stfpm_ext {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// A stretch of one image's positions at one level.
struct PositionTask {
  int level;
  int64_t image, begin, end;
};

/// Tasks for all positions, of `size` each except the last of a level.
std::vector<PositionTask> position_tasks(const Level* levels, int num_levels, int64_t batch, int64_t size);

/// Bytes of the features of both sides at all levels.
int64_t bytes_of_features(const Level* levels, int num_levels, int64_t batch, DType dtype);

/// How many of the threads allowed to use for work that reads and writes `bytes`.
int threads_for(int64_t bytes, int num_threads);

/// Tasks 0 to `count` - 1, taken by whichever thread is free.
class TaskQueue {
 public:
  explicit TaskQueue(int64_t count) : count_(count) {}

  template <class Task>
  void work(const Task& task) {
    for (int64_t index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      task(index);
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) tell();
    }
  }

  /// Returns once every task is done.
  void wait();

 private:
  void tell();

  const int64_t count_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

}  // namespace stfpm_ext
