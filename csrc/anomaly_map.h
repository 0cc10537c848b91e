// SPDX-License-Identifier: Apache-2.0
//
// The scorer: what a call of it is, and its entry points.

#pragma once

#include "levels.h"

namespace stfpm_ext {

enum class Combination { kProduct, kSum, kMaximum };

/// One call of the scorer. The outputs are contiguous: float64 for float64 features, otherwise float32.
struct AnomalyMapParams {
  DType dtype;
  Combination combination;
  int num_levels;
  Level levels[kMaxLevels];
  int64_t batch;
  int64_t height;  // of the map, in pixels
  int64_t width;
  int64_t combine_height;  // size at which the levels are combined; then upsampled to the map's, if that is another
  int64_t combine_width;
  void* map;         // [B, 1, height, width]
  void* score;       // [B]
  void* level_maps;  // [B, num_levels, combine_height, combine_width], the upsampled distances without weights; or null
};

inline bool combines_in_map(const AnomalyMapParams& params) {
  return params.combine_height == params.height && params.combine_width == params.width;
}

inline bool is_weighted_product(const AnomalyMapParams& params) {
  if (params.combination != Combination::kProduct) return false;
  for (int index = 0; index < params.num_levels; ++index)
    if (params.levels[index].weight != 1.0) return true;
  return false;
}

/// The first of two steps where the levels are combined at another size than the map's. It writes `combined`, [B,
/// combine_height, combine_width] of the map's type.
inline AnomalyMapParams combining_step(AnomalyMapParams params, void* combined) {
  params.height = params.combine_height;
  params.width = params.combine_width;
  params.map = combined;
  return params;
}

/// The second step. It writes the map from what was combined, as if that were the distances of a single level.
inline AnomalyMapParams upsampling_step(AnomalyMapParams params) {
  params.num_levels = 1;
  params.combination = Combination::kProduct;
  params.levels[0].height = params.combine_height;
  params.levels[0].width = params.combine_width;
  params.levels[0].weight = 1.0;
  params.level_maps = nullptr;
  return params;
}

/// Computes maps and scores on at most `num_threads` threads; the result does not depend on their number.
void anomaly_map_cpu(const AnomalyMapParams& params, int num_threads);

/// Enqueues the same on a CUDA stream of `device`, to whose memory all pointers lead. Neither allocates nor
/// synchronises. `scratch`: room for the distances of all levels, batch * sum of height * width elements of the map's
/// type, and behind them, unless combines_in_map(), batch * combine_height * combine_width more.
void anomaly_map_cuda(const AnomalyMapParams& params, void* scratch, int device, void* stream);

/// Throws std::runtime_error where `device` does not run the kernels: this build has no code for it, or its driver is
/// too old for this build. Launches nothing.
void try_cuda(int device);

}  // namespace stfpm_ext
