// SPDX-License-Identifier: Apache-2.0
//
// The gradients of the loss, from the factors and projections of its first phase.

#pragma once

#include <cstring>

#include "../../distance_math.h"
#include "elements.h"

namespace stfpm_ext {
namespace {

/// The gradients of kChannels channels of positions [begin, end), which are neighbours in memory (NCHW).
template <int kChannels, class T, class Real>
void channel_gradients(const T* teacher, int64_t teacher_stride, const T* student, int64_t student_stride, T* gradients,
                       int64_t gradients_stride, int64_t begin, int64_t end, const Real* factors,
                       const Real* projections, double scale) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const double factor = scale * load(factors[i]), projection = load(projections[i]);
#pragma GCC unroll 8
    for (int channel = 0; channel < kChannels; ++channel) {
      const double t = load(teacher[channel * teacher_stride + i]), s = load(student[channel * student_stride + i]);
      store(matching_gradient(factor, projection, t, s), gradients[channel * gradients_stride + i]);
    }
  }
}

/// The gradients of one position, whose channels lie `stride` apart (1: channels_last).
template <class T>
void position_gradients(const T* teacher, int64_t teacher_stride, const T* student, int64_t student_stride,
                        T* gradients, int64_t gradients_stride, int64_t channels, double factor, double projection) {
#pragma omp simd
  for (int64_t channel = 0; channel < channels; ++channel) {
    const double t = load(teacher[channel * teacher_stride]), s = load(student[channel * student_stride]);
    store(matching_gradient(factor, projection, t, s), gradients[channel * gradients_stride]);
  }
}

template <class T, class Real>
void level_gradients(const Level& level, const MutableFeatures& target, int64_t image, int64_t begin, int64_t end,
                     const Real* factors, const Real* projections, double scale) {
  const Plane<const T> teacher(level.teacher, image), student(level.student, image);
  const Plane<T> gradients(target, image);
  const bool side_by_side = columns_adjacent(level, level.teacher) && columns_adjacent(level, level.student) &&
                            columns_adjacent(level, target);
  const bool whole_level =
      rows_adjacent(level, level.teacher) && rows_adjacent(level, level.student) && rows_adjacent(level, target);
  const bool channels_last =
      teacher.channel_stride == 1 && student.channel_stride == 1 && gradients.channel_stride == 1;
  for (int64_t position = begin, count; position < end; position += count) {
    const int64_t row = position / level.width, column = position % level.width;
    count = end - position;
    if (!(side_by_side && whole_level) && count > level.width - column) count = level.width - column;
    const T* const t = teacher.at(row, column);
    const T* const s = student.at(row, column);
    T* const g = gradients.at(row, column);
    if (side_by_side) {
      for_each_lot(t, teacher.channel_stride, s, student.channel_stride, level.channels, count,
                   [&](auto lot, int64_t channel, int64_t first, int64_t last) {
                     channel_gradients<lot.count>(t + channel * teacher.channel_stride, teacher.channel_stride,
                                                  s + channel * student.channel_stride, student.channel_stride,
                                                  g + channel * gradients.channel_stride, gradients.channel_stride,
                                                  first, last, factors + position, projections + position, scale);
                   });
      continue;
    }
    for (int64_t i = 0; i < count; ++i) {
      const double factor = scale * load(factors[position + i]), projection = load(projections[position + i]);
      const T* const one_t = t + i * teacher.column_stride;
      const T* const one_s = s + i * student.column_stride;
      T* const one_g = g + i * gradients.column_stride;
      if (channels_last && factor == 0.0)  // as of most positions where the hardest alone count
        std::memset(one_g, 0, static_cast<size_t>(level.channels) * sizeof(T));
      else if (channels_last)
        position_gradients(one_t, 1, one_s, 1, one_g, 1, level.channels, factor, projection);
      else
        position_gradients(one_t, teacher.channel_stride, one_s, student.channel_stride, one_g,
                           gradients.channel_stride, level.channels, factor, projection);
    }
  }
}

}  // namespace
}  // namespace stfpm_ext
