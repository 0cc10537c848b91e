// SPDX-License-Identifier: Apache-2.0
//
// The second phase of the scorer: distances are stretched to the rows of the map and combined there.

#pragma once

#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "../../distance_math.h"
#include "../kernels.h"
#include "dot_products.h"

namespace stfpm_ext {
namespace {

/// Stretches one row of distances to pixels [begin, end) of the map's row.
template <class Real>
void stretch_pixels(const Real* row, const Columns& columns, int64_t begin, int64_t end, Real* stretched) {
  const Real* low_weight = static_cast<const Real*>(columns.low_weight);
  const Real* high_weight = static_cast<const Real*>(columns.high_weight);
#pragma omp simd
  for (int64_t x = begin; x < end; ++x)
    stretched[x] = low_weight[x] * row[columns.low[x]] + high_weight[x] * row[columns.high[x]];
}

/// Stretches one row of distances to the width of the map.
inline void stretch_row(const double* row, const Columns& columns, int64_t width, double* stretched) {
  stretch_pixels(row, columns, 0, width, stretched);
}

#if defined(__AVX2__) && defined(__GNUC__)
#ifdef __AVX512F__
constexpr int kFloatLanes = 16;
#else
constexpr int kFloatLanes = 8;
#endif
typedef float Floats __attribute__((vector_size(sizeof(float) * kFloatLanes)));
typedef int32_t Indices __attribute__((vector_size(sizeof(int32_t) * kFloatLanes)));

inline Floats shuffle(Floats values, Indices indices) {
#ifdef __AVX512F__
  // All lanes; without a mask, GCC warns of its own header.
  return _mm512_maskz_permutexvar_ps(0xFFFF, reinterpret_cast<__m512i>(indices), values);
#else
  return _mm256_permutevar8x32_ps(values, reinterpret_cast<__m256i>(indices));
#endif
}

/// As above, a vector of pixels at a time. Where the distances they lie between fit into two overlapping vectors, two
/// loads and two shuffles fetch them, in a fifth of the time of gather instructions.
inline void stretch_row(const float* row, const Columns& columns, int64_t width, float* stretched) {
  static_assert(kFloatLanes <= kRowPadding);
  int64_t x = 0;
  for (; x + kFloatLanes <= width; x += kFloatLanes) {
    const int32_t first = columns.low[x];
    if (columns.high[x] == first || columns.high[x + kFloatLanes - 1] > first + kFloatLanes) {
      stretch_pixels(row, columns, x, x + kFloatLanes, stretched);
      continue;
    }
    Floats from_first, from_second, low_weight, high_weight;
    Indices low, high;
    std::memcpy(&from_first, row + first, sizeof from_first);
    std::memcpy(&from_second, row + first + 1, sizeof from_second);
    std::memcpy(&low, columns.low + x, sizeof low);
    std::memcpy(&high, columns.high + x, sizeof high);
    std::memcpy(&low_weight, static_cast<const float*>(columns.low_weight) + x, sizeof low_weight);
    std::memcpy(&high_weight, static_cast<const float*>(columns.high_weight) + x, sizeof high_weight);
    const Floats pixels =
        low_weight * shuffle(from_first, low - first) + high_weight * shuffle(from_second, high - (first + 1));
    std::memcpy(stretched + x, &pixels, sizeof pixels);
  }
  stretch_pixels(row, columns, x, width, stretched);
}
#else
inline void stretch_row(const float* row, const Columns& columns, int64_t width, float* stretched) {
  stretch_pixels(row, columns, 0, width, stretched);
}
#endif

/// Two stretched rows of a level, kept while the rows of the map that lie between them are made.
template <class Real>
struct StretchedRows {
  Real* slot[2];
  int64_t row[2] = {-1, -1};

  const Real* get(int64_t wanted, const Real* distances, int64_t level_width, const Columns& columns, int64_t width) {
    const int64_t index = wanted % 2;  // neighbouring rows never share a slot
    if (row[index] != wanted) {
      stretch_row(distances + wanted * level_width, columns, width, slot[index]);
      row[index] = wanted;
    }
    return slot[index];
  }
};

/// A row between two stretched rows of a level.
template <class Real>
struct LevelRow {
  const Real *low, *high;
  Real low_weight, high_weight;

  Real operator[](int64_t x) const { return low_weight * low[x] + high_weight * high[x]; }
};

/// Combines a level with those before it.
template <class Real, class Combine>
void add_level_to_row(const LevelRow<Real> level, int64_t width, Real* row, bool first, Combine combine) {
  if (first) {
#pragma omp simd
    for (int64_t x = 0; x < width; ++x) row[x] = combine(Real(Combine::identity), level[x]);
  } else {
#pragma omp simd
    for (int64_t x = 0; x < width; ++x) row[x] = combine(row[x], level[x]);
  }
}

/// Likewise for weighted products, whose sums of logarithms are in two rows.
template <class Real>
void add_logarithms_to_row(const LevelRow<Real> level, int64_t width, Real* exact, Real* rest, bool first,
                           WeightedProduct combine) {
  if (first) {
#pragma omp simd
    for (int64_t x = 0; x < width; ++x) {
      const LogarithmSum<Real> sum = combine(LogarithmSum<Real>(), level[x]);
      exact[x] = sum.exact, rest[x] = sum.rest;
    }
  } else {
#pragma omp simd
    for (int64_t x = 0; x < width; ++x) {
      const LogarithmSum<Real> sum = combine(LogarithmSum<Real>(exact[x], rest[x]), level[x]);
      exact[x] = sum.exact, rest[x] = sum.rest;
    }
  }
}

/// The maximum of pixels, or NaN where one is NaN. In lanes, since not all compilers vectorise a maximum.
template <class Real>
class Maximum {
 public:
  void add_row(const Real* row, int64_t width) {
    int64_t x = 0;
    for (; x + kLanes <= width; x += kLanes) {
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes; ++lane) add(row[x + lane], lane);
    }
    for (; x < width; ++x) add(row[x], 0);
  }

  double value() const {
    double maximum = 0.0;  // distances are not negative
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (nan_[lane] != 0) return static_cast<double>(NAN);
      if (maximum_[lane] > maximum) maximum = maximum_[lane];
    }
    return maximum;
  }

 private:
  void add(Real pixel, int64_t lane) {
    maximum_[lane] = pixel > maximum_[lane] ? pixel : maximum_[lane];
    nan_[lane] = pixel != pixel ? Real(1) : nan_[lane];
  }

  Real maximum_[kLanes] = {};
  Real nan_[kLanes] = {};
};

template <class Real>
double map_rows(const AnomalyMapParams& params, const void* const* distances, const Columns* columns, int64_t image,
                int64_t begin, int64_t end, Real* scratch) {
  const int64_t width = params.width, pixels = params.height * width;
  Real* const map = static_cast<Real*>(params.map) + image * pixels;
  Real* const level_maps = static_cast<Real*>(params.level_maps);
  StretchedRows<Real> stretched[kMaxLevels];
  double scale[kMaxLevels];
  for (int level = 0; level < params.num_levels; ++level) {
    scale[level] = interpolation_scale(params.levels[level].height, params.height);
    for (Real*& slot : stretched[level].slot) {
      slot = scratch;
      scratch += width;
    }
  }

  const bool is_weighted = is_weighted_product(params);
  Real* const rest = scratch;  // of the logarithms
  Maximum<Real> maximum;
  for (int64_t y = begin; y < end; ++y) {
    Real* const row = map + y * width;
    bool first = true;
    for (int index = 0; index < params.num_levels; ++index) {
      const Level& level = params.levels[index];
      const Real* const level_distances = static_cast<const Real*>(distances[index]);
      const auto source = interpolation<Real>(y, level.height, scale[index]);
      const Real* const low = stretched[index].get(source.low, level_distances, level.width, columns[index], width);
      const Real* const high = stretched[index].get(source.high, level_distances, level.width, columns[index], width);
      const LevelRow<Real> level_row{low, high, source.low_weight, source.high_weight};
      if (level_maps != nullptr) {
        Real* const kept = level_maps + (image * params.num_levels + index) * pixels + y * width;
#pragma omp simd
        for (int64_t x = 0; x < width; ++x) kept[x] = level_row[x];
      }
      if (params.combination == Combination::kSum)
        add_level_to_row(level_row, width, row, first, WeightedSum{level.weight});
      else if (params.combination == Combination::kMaximum)
        add_level_to_row(level_row, width, row, first, WeightedMaximum{level.weight});
      else if (!is_weighted)
        add_level_to_row(level_row, width, row, first, Product{level.weight});
      else if (level.weight != 0.0)
        add_logarithms_to_row(level_row, width, row, rest, first, WeightedProduct(level.weight));
      else
        continue;
      first = false;
    }
    if (is_weighted) {
      if (first)  // no level counts
        for (int64_t x = 0; x < width; ++x) row[x] = rest[x] = 0;
#pragma omp simd
      for (int64_t x = 0; x < width; ++x) row[x] = WeightedProduct::result(LogarithmSum<Real>(row[x], rest[x]));
    }
    maximum.add_row(row, width);
  }
  return maximum.value();
}

}  // namespace
}  // namespace stfpm_ext
