// SPDX-License-Identifier: Apache-2.0
//
// Max pooling of features whose channels are neighbours in memory (channels_last), on the CPU. torch's keeps the place
// of each maximum, which inference does not need, and takes twice as long.

#pragma once

#include "levels.h"

namespace stfpm_ext {

/// One call. Windows are squares; what they cover beyond the features does not count.
struct MaxPoolingParams {
  DType dtype;
  const void* features;  // [batch, height, width, channels]
  void* maxima;          // [batch, pooled_height, pooled_width, channels]
  int64_t batch, channels, height, width, pooled_height, pooled_width;
  int64_t window, stride, padding;  // the padding is less than the window
};

/// Writes the maxima, or NaN where a window has one.
void max_pooling_cpu(const MaxPoolingParams& params, int num_threads);

}  // namespace stfpm_ext
