// SPDX-License-Identifier: Apache-2.0
//
// Max pooling: threads take rows of the result.

#include <vector>

#include "../max_pooling.h"
#include "dispatch.h"
#include "tasks.h"
#include "team.h"

namespace stfpm_ext {

void max_pooling_cpu(const MaxPoolingParams& params, int num_threads) {
  const Kernels& kernel = kernels();
  const int64_t elements = params.batch * params.height * params.width * params.channels;
  const auto row_bytes = static_cast<size_t>(params.width * params.channels * pixel_bytes(params.dtype));
  TaskQueue queue(params.batch * params.pooled_height);
  run_team(threads_for(elements * feature_bytes(params.dtype), num_threads), [&] {
    std::vector<unsigned char> scratch(row_bytes);
    queue.work([&](int64_t row) {
      kernel.max_pooling(params, row / params.pooled_height, row % params.pooled_height, scratch.data());
    });
  });
}

}  // namespace stfpm_ext
