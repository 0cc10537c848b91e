// SPDX-License-Identifier: Apache-2.0
//
// The first phase of scorer and loss: the dot products of positions, in double.

#pragma once

#include <cstring>

#include "../../distance_math.h"
#include "../kernels.h"
#include "elements.h"

namespace stfpm_ext {
namespace {

/// The dot products of up to kTile positions.
struct DotProducts {
  double teacher_teacher[kTile], student_student[kTile], teacher_student[kTile];
};

/// Adds kChannels channels of positions [begin, end), which are neighbours in memory (NCHW): a lane for each position.
/// Several channels at a time, since the sums are read and written back for each lot.
template <int kChannels, class T>
void add_channels(const T* teacher, int64_t teacher_stride, const T* student, int64_t student_stride, int64_t begin,
                  int64_t end, DotProducts& sums) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    double tt = sums.teacher_teacher[i], ss = sums.student_student[i], ts = sums.teacher_student[i];
#pragma GCC unroll 8
    for (int channel = 0; channel < kChannels; ++channel) {
      const double t = load(teacher[channel * teacher_stride + i]), s = load(student[channel * student_stride + i]);
      tt = multiply_add(t, t, tt);
      ss = multiply_add(s, s, ss);
      ts = multiply_add(t, s, ts);
    }
    sums.teacher_teacher[i] = tt;
    sums.student_student[i] = ss;
    sums.teacher_student[i] = ts;
  }
}

template <class T>
void add_positions_side_by_side(const T* teacher, int64_t teacher_stride, const T* student, int64_t student_stride,
                                int64_t channels, int64_t count, DotProducts& sums) {
  for (int64_t i = 0; i < count; ++i) sums.teacher_teacher[i] = sums.student_student[i] = sums.teacher_student[i] = 0;
  for_each_lot(teacher, teacher_stride, student, student_stride, channels, count,
               [&](auto lot, int64_t channel, int64_t begin, int64_t end) {
                 add_channels<lot.count>(teacher + channel * teacher_stride, teacher_stride,
                                         student + channel * student_stride, student_stride, begin, end, sums);
               });
}

constexpr int64_t kLanes = 16;

/// Adds up the lanes by halves, in registers. Compilers make a loop go through memory, where each half waits for the
/// stores of the one before.
inline double sum_of_lanes(const double (&lanes)[kLanes]) {
#ifdef __GNUC__
  typedef double Two __attribute__((vector_size(16)));
  typedef double Four __attribute__((vector_size(32)));
  typedef double Eight __attribute__((vector_size(64)));
  Eight eight[2];
  std::memcpy(eight, lanes, sizeof eight);
  eight[0] += eight[1];
  Four four[2];
  std::memcpy(four, eight, sizeof four);
  four[0] += four[1];
  Two two[2];
  std::memcpy(two, four, sizeof two);
  two[0] += two[1];
  return two[0][0] + two[0][1];
#else
  double sums[kLanes];
  std::memcpy(sums, lanes, sizeof sums);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
#endif
}

/// One position, whose channels lie `stride` apart (1: channels_last). The lanes are a fixed number of partial sums,
/// added up in a fixed order, so that the result is the same for every vector width.
template <class T>
void add_one_position(const T* teacher, int64_t teacher_stride, const T* student, int64_t student_stride,
                      int64_t channels, int64_t position, DotProducts& sums) {
  double tt[kLanes] = {}, ss[kLanes] = {}, ts[kLanes] = {};
  int64_t channel = 0;
  for (; channel + kLanes <= channels; channel += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double t = load(teacher[(channel + lane) * teacher_stride]);
      const double s = load(student[(channel + lane) * student_stride]);
      tt[lane] = multiply_add(t, t, tt[lane]);
      ss[lane] = multiply_add(s, s, ss[lane]);
      ts[lane] = multiply_add(t, s, ts[lane]);
    }
  }
  for (int64_t lane = 0; channel < channels; ++channel, ++lane) {
    const double t = load(teacher[channel * teacher_stride]), s = load(student[channel * student_stride]);
    tt[lane] = multiply_add(t, t, tt[lane]);
    ss[lane] = multiply_add(s, s, ss[lane]);
    ts[lane] = multiply_add(t, s, ts[lane]);
  }
  sums.teacher_teacher[position] = sum_of_lanes(tt);
  sums.student_student[position] = sum_of_lanes(ss);
  sums.teacher_student[position] = sum_of_lanes(ts);
}

/// Sums up the dot products of positions [begin, end), at most kTile at a time, and of one row unless all rows are
/// adjacent. `use(position, count, sums)` gets them.
template <class T, class Use>
void dot_products(const Level& level, int64_t image, int64_t begin, int64_t end, const Use& use) {
  const Plane<const T> teacher(level.teacher, image), student(level.student, image);
  const bool side_by_side = columns_adjacent(level, level.teacher) && columns_adjacent(level, level.student);
  const bool whole_level = rows_adjacent(level, level.teacher) && rows_adjacent(level, level.student);
  DotProducts sums;
  for (int64_t position = begin, count; position < end; position += count) {
    const int64_t row = position / level.width, column = position % level.width;
    count = end - position < kTile ? end - position : kTile;
    if (!(side_by_side && whole_level) && count > level.width - column) count = level.width - column;
    const T* const t = teacher.at(row, column);
    const T* const s = student.at(row, column);
    if (side_by_side) {
      add_positions_side_by_side(t, teacher.channel_stride, s, student.channel_stride, level.channels, count, sums);
    } else if (teacher.channel_stride == 1 && student.channel_stride == 1) {
      for (int64_t i = 0; i < count; ++i)
        add_one_position(t + i * teacher.column_stride, 1, s + i * student.column_stride, 1, level.channels, i, sums);
    } else {
      for (int64_t i = 0; i < count; ++i)
        add_one_position(t + i * teacher.column_stride, teacher.channel_stride, s + i * student.column_stride,
                         student.channel_stride, level.channels, i, sums);
    }
    use(position, count, sums);
  }
}

}  // namespace
}  // namespace stfpm_ext
