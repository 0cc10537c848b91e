// SPDX-License-Identifier: Apache-2.0
//
// The table of loops that every instruction set fills. kernels.cpp is compiled once for each of them; nothing but
// its table, kernels_<isa>, is visible outside. dispatch.h chooses one.

#pragma once

#include "../anomaly_map.h"
#include "../feature_matching.h"
#include "../max_pooling.h"

namespace stfpm_ext {

/// The most positions whose dot products are summed up at a time: longer stretches of each channel are read faster,
/// while the sums (24 KiB) must stay in the nearest caches.
constexpr int64_t kTile = 1024;

/// How many elements past its end a row of distances must be readable; what they hold does not matter.
constexpr int64_t kRowPadding = 16;

/// How the columns of a level map onto the columns of the map: `width` entries each. Real: float or double.
struct Columns {
  const int32_t* low;
  const int32_t* high;
  const void* low_weight;   // Real
  const void* high_weight;  // Real
};

/// The loops over one image. Real is double for float64 features and float otherwise.
struct Kernels {
  const char* isa;

  /// Writes the distances d (Real) of positions [begin, end) of one level, row-major.
  void (*distances)(DType dtype, const Level& level, int64_t image, int64_t begin, int64_t end, void* distances);

  /// Writes rows [begin, end) of one image's map (and level maps), and returns the map's maximum in them, or NaN if
  /// there is one. `distances[l]`: the image's distances at level l, [height, width]. `scratch`: (2 * num_levels + 1) *
  /// width Reals.
  double (*rows)(const AnomalyMapParams& params, const void* const* distances, const Columns* columns, int64_t image,
                 int64_t begin, int64_t end, void* scratch);

  /// Writes the factors, projections and values (Matching in distance_math.h; Real) of positions [begin, end) of one
  /// level, row-major, and returns the sum of the values.
  double (*matching)(DType dtype, const Level& level, int64_t image, int64_t begin, int64_t end, void* factors,
                     void* projections, void* values);

  /// Writes the gradients of positions [begin, end) of one level, from the factors, which it multiplies by `scale`, and
  /// projections (Real) of the image.
  void (*matching_gradients)(DType dtype, const Level& level, const MutableFeatures& gradients, int64_t image,
                             int64_t begin, int64_t end, const void* factors, const void* projections, double scale);

  /// Writes a row of one image's maxima. `scratch`: width * channels Reals.
  void (*max_pooling)(const MaxPoolingParams& params, int64_t image, int64_t row, void* scratch);
};

}  // namespace stfpm_ext
