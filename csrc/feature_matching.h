// SPDX-License-Identifier: Apache-2.0
//
// The training loss: what a call of it is, and its entry points.

#pragma once

#include "levels.h"

namespace stfpm_ext {

/// One call of the loss, forward or backward; the weights of its levels are not read.
struct FeatureMatchingParams {
  DType dtype;
  int num_levels;
  Level levels[kMaxLevels];
  int64_t batch;  // at least 1
  /// What forward knows of each position (Matching in distance_math.h): the factors of all positions, level by level
  /// [batch, height, width], then the projections, then the values. Backward reads factors and projections. float64
  /// for float64 features, otherwise float32.
  void* scalars;
};

/// Writes the loss, of the type of the scalars, and the scalars. The result does not depend on `num_threads`.
void feature_matching_cpu(const FeatureMatchingParams& params, void* loss, int num_threads);

/// Writes the gradients of `upstream` times the loss (of the type of the scalars) with respect to the student's
/// features; `gradients`: where they go, for each level.
void feature_matching_backward_cpu(const FeatureMatchingParams& params, const void* upstream,
                                   const MutableFeatures* gradients, int num_threads);

/// Both enqueue the same on a CUDA stream of `device`, to whose memory all pointers lead. They neither allocate nor
/// synchronise. `partial_sums`: room for kMostPartialSums.
constexpr int kMostPartialSums = 1024;
void feature_matching_cuda(const FeatureMatchingParams& params, void* loss, double* partial_sums, int device,
                           void* stream);
void feature_matching_backward_cuda(const FeatureMatchingParams& params, const void* upstream,
                                    const MutableFeatures* gradients, int device, void* stream);

}  // namespace stfpm_ext
