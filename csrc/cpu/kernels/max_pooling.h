// SPDX-License-Identifier: Apache-2.0
//
// Max pooling of one row: over the rows of the windows first, and then over their columns.

#pragma once

#include "../../max_pooling.h"
#include "elements.h"

namespace stfpm_ext {
namespace {

/// The larger of both, or NaN.
template <class Real>
Real larger(Real one, Real other) {
  return other > one || other != other ? other : one;
}

template <class Real>
void raise(const Real* others, int64_t count, Real* maxima) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) maxima[i] = larger(maxima[i], others[i]);
}

/// Calls `use(index, is_first)` for what a window covers along one axis.
template <class Use>
void for_each_covered(const MaxPoolingParams& params, int64_t pooled, int64_t size, const Use& use) {
  const int64_t start = pooled * params.stride - params.padding, stop = start + params.window;
  const int64_t first = start < 0 ? 0 : start;
  for (int64_t index = first; index < (stop < size ? stop : size); ++index) use(index, index == first);
}

/// Writes one row of an image's maxima. `column_maxima`: room for [width, channels].
template <class T, class Real>
void pool_row(const MaxPoolingParams& params, int64_t image, int64_t row, Real* column_maxima) {
  const int64_t channels = params.channels, count = params.width * channels;
  const T* features = static_cast<const T*>(params.features) + image * params.height * count;
  T* maxima = static_cast<T*>(params.maxima) + (image * params.pooled_height + row) * params.pooled_width * channels;
  for_each_covered(params, row, params.height, [&](int64_t y, bool is_first) {
    const T* line = features + y * count;
    if (is_first) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) column_maxima[i] = static_cast<Real>(load(line[i]));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) column_maxima[i] = larger(column_maxima[i], static_cast<Real>(load(line[i])));
    }
  });
  // Maxima are collected in the first column of a window. A later window covers that column only if it, too, reaches
  // beyond the left edge, and then it covers all of this window.
  for (int64_t x = 0; x < params.pooled_width; ++x) {
    Real* first = nullptr;
    for_each_covered(params, x, params.width, [&](int64_t column, bool is_first) {
      Real* covered = column_maxima + column * channels;
      if (is_first)
        first = covered;
      else
        raise(covered, channels, first);
    });
#pragma omp simd
    for (int64_t i = 0; i < channels; ++i) store(static_cast<double>(first[i]), maxima[x * channels + i]);
  }
}

}  // namespace
}  // namespace stfpm_ext
