// SPDX-License-Identifier: Apache-2.0
//
// Max pooling: threads take rows of the result.

#include <atomic>
#include <memory>

#include "../max_pooling.h"
#include "dispatch.h"
#include "tasks.h"
#include "team.h"

namespace stfpm_ext {

void max_pooling_cpu(const MaxPoolingParams& params, int num_threads) {
  const Kernels& kernel = kernels();
  const int64_t elements = params.batch * params.height * params.width * params.channels;
  const auto row_bytes = static_cast<size_t>(params.width * params.channels * pixel_bytes(params.dtype));
  num_threads = threads_for(elements * feature_bytes(params.dtype), num_threads);
  TaskQueue queue(params.batch * params.pooled_height);
  // As in anomaly_map_cpu.cpp: a thread of the team could not report a lack of memory.
  const std::unique_ptr<unsigned char[]> all_scratch(new unsigned char[static_cast<size_t>(num_threads) * row_bytes]);
  std::atomic<size_t> next_member{0};
  run_team(num_threads, [&] {
    unsigned char* const scratch = all_scratch.get() + next_member.fetch_add(1) * row_bytes;
    queue.work([&](int64_t row) {
      kernel.max_pooling(params, row / params.pooled_height, row % params.pooled_height, scratch);
    });
  });
}

}  // namespace stfpm_ext
