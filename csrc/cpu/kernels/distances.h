// SPDX-License-Identifier: Apache-2.0
//
// What dot products are turned into: distances for the scorer; values, factors and projections for the loss.

#pragma once

#include "dot_products.h"

namespace stfpm_ext {
namespace {

template <class T, class Real>
void level_distances(const Level& level, int64_t image, int64_t begin, int64_t end, Real* distances) {
  dot_products<T>(level, image, begin, end, [&](int64_t position, int64_t count, const DotProducts& sums) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      distances[position + i] = static_cast<Real>(
          half_squared_distance(sums.teacher_teacher[i], sums.student_student[i], sums.teacher_student[i]));
  });
}

template <class T, class Real>
double level_matching(const Level& level, int64_t image, int64_t begin, int64_t end, Real* factors, Real* projections,
                      Real* values) {
  double sum = 0;
  dot_products<T>(level, image, begin, end, [&](int64_t position, int64_t count, const DotProducts& sums) {
    double exact[kTile];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const Matching one = matching(sums.teacher_teacher[i], sums.student_student[i], sums.teacher_student[i]);
      exact[i] = one.value;
      factors[position + i] = static_cast<Real>(one.factor);
      projections[position + i] = static_cast<Real>(one.projection);
      values[position + i] = static_cast<Real>(one.value);
    }
    for (int64_t i = 0; i < count; ++i) sum += exact[i];  // in this order, for every vector width
  });
  return sum;
}

}  // namespace
}  // namespace stfpm_ext
