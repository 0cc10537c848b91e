// SPDX-License-Identifier: Apache-2.0

#include "tasks.h"

#include <algorithm>
#include <thread>

#include "team.h"

namespace stfpm_ext {

// Another thread costs some microseconds, in which a core reads about this much.
constexpr int64_t kBytesPerThread = 256 * 1024;

constexpr int kRoundsBeforeSleep = 100;

std::vector<PositionTask> position_tasks(const Level* levels, int num_levels, int64_t batch, int64_t size) {
  std::vector<PositionTask> tasks;
  for (int64_t image = 0; image < batch; ++image)
    for (int index = num_levels - 1; index >= 0; --index) {  // coarse levels first: the largest tasks
      const int64_t positions = levels[index].height * levels[index].width;
      for (int64_t begin = 0; begin < positions; begin += size)
        tasks.push_back({index, image, begin, std::min(begin + size, positions)});
    }
  return tasks;
}

int64_t bytes_of_features(const Level* levels, int num_levels, int64_t batch, DType dtype) {
  int64_t features = 0;
  for (int index = 0; index < num_levels; ++index)
    features += 2 * batch * levels[index].height * levels[index].width * levels[index].channels;
  return features * feature_bytes(dtype);
}

int threads_for(int64_t bytes, int num_threads) {
  return static_cast<int>(std::clamp<int64_t>(ceil_div(bytes, kBytesPerThread), 1, std::max(num_threads, 1)));
}

void TaskQueue::wait() {
  const auto is_done = [&] { return done_.load(std::memory_order_acquire) >= count_; };
  // Most tasks still under way end within microseconds.
  for (int round = 0; round < kRoundsBeforeSleep; ++round) {
    if (is_done()) return;
    std::this_thread::yield();
  }
  wait_in_team([&] {  // for a thread that has lost the processor; it may have ours
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, is_done);
  });
}

void TaskQueue::tell() {
  const std::lock_guard<std::mutex> lock(mutex_);
  all_done_.notify_all();
}

}  // namespace stfpm_ext
