// SPDX-License-Identifier: Apache-2.0
//
// The loops, compiled once per instruction set (STFPM_EXT_ISA) and vectorised by the compiler. Includes no
// standard header with inline functions: their copies could leak into objects of a lesser instruction set.

#include "kernels.h"

#include <cstring>

#include "../anomaly_map_math.h"

namespace stfpm_ext {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline double load(float value) { return static_cast<double>(value); }
inline double load(double value) { return value; }
inline double load(BFloat16 value) { return static_cast<double>(float_from_bits(uint32_t{value.bits} << 16)); }

/// Exact for every half, in integer arithmetic that compilers vectorise. Rebasing the exponent takes 112 more;
/// subnormals are rebuilt by subtracting 2^-14 from a normal number, infinity and NaN take a further 112.
inline double load(Half value) {
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t normal = magnitude + 0x38000000u;
  const float subnormal = float_from_bits(magnitude + 0x38800000u) - 6.103515625e-05f;
  const float unsigned_value =
      exponent == 0 ? subnormal : float_from_bits(exponent == 0x0f800000u ? normal + 0x38000000u : normal);
  return static_cast<double>(value.bits & 0x8000u ? -unsigned_value : unsigned_value);
}

/// Features of one image with the element type known.
template <class T>
struct Plane {
  const T* data;
  int64_t channel_stride, row_stride, column_stride;

  Plane(const Features& features, int64_t image)
      : data(static_cast<const T*>(features.data) + image * features.batch_stride),
        channel_stride(features.channel_stride),
        row_stride(features.row_stride),
        column_stride(features.column_stride) {}

  const T* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
};

/// `count` <= kTile positions that are neighbours in memory (NCHW): one pass over the channels, a lane per position.
template <class T, class Real>
void planar_distances(const T* teacher, int64_t teacher_stride, const T* student, int64_t student_stride,
                      int64_t channels, int64_t count, Real* distances) {
  double tt[kTile] = {}, ss[kTile] = {}, ts[kTile] = {};
  for (int64_t channel = 0; channel < channels; ++channel) {
    const T* t_row = teacher + channel * teacher_stride;
    const T* s_row = student + channel * student_stride;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const double t = load(t_row[i]), s = load(s_row[i]);
      tt[i] = multiply_add(t, t, tt[i]);
      ss[i] = multiply_add(s, s, ss[i]);
      ts[i] = multiply_add(t, s, ts[i]);
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) distances[i] = static_cast<Real>(half_squared_distance(tt[i], ss[i], ts[i]));
}

/// One position whose channels lie `stride` apart. The lanes are a fixed number of partial sums, added up in a fixed
/// order, so that the result is the same for every vector width.
template <class T>
double strided_distance(const T* teacher, int64_t teacher_stride, const T* student, int64_t student_stride,
                        int64_t channels) {
  constexpr int64_t kLanes = 16;
  double tt[kLanes] = {}, ss[kLanes] = {}, ts[kLanes] = {};
  const auto add = [&](int64_t channel, int64_t lane) {
    const double t = load(teacher[channel * teacher_stride]), s = load(student[channel * student_stride]);
    tt[lane] = multiply_add(t, t, tt[lane]);
    ss[lane] = multiply_add(s, s, ss[lane]);
    ts[lane] = multiply_add(t, s, ts[lane]);
  };
  int64_t channel = 0;
  for (; channel + kLanes <= channels; channel += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) add(channel + lane, lane);
  }
  for (; channel < channels; ++channel) add(channel, channel % kLanes);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) {
      tt[lane] += tt[lane + half];
      ss[lane] += ss[lane + half];
      ts[lane] += ts[lane + half];
    }
  return half_squared_distance(tt[0], ss[0], ts[0]);
}

template <class T, class Real>
void level_distances(const Level& level, int64_t image, int64_t begin, int64_t end, Real* distances) {
  const Plane<T> teacher(level.teacher, image), student(level.student, image);
  const int64_t width = level.width;
  const bool columns_adjacent = width == 1 || (teacher.column_stride == 1 && student.column_stride == 1);
  const bool rows_adjacent = level.height == 1 || (teacher.row_stride == width && student.row_stride == width);
  for (int64_t position = begin; position < end;) {
    const int64_t row = position / width, column = position % width;
    const T* t = teacher.at(row, column);
    const T* s = student.at(row, column);
    if (columns_adjacent) {
      int64_t count = end - position;
      if (!rows_adjacent && count > width - column) count = width - column;
      if (count > kTile) count = kTile;
      planar_distances(t, teacher.channel_stride, s, student.channel_stride, level.channels, count,
                       distances + position);
      position += count;
    } else if (teacher.channel_stride == 1 && student.channel_stride == 1) {
      distances[position++] = static_cast<Real>(strided_distance(t, 1, s, 1, level.channels));
    } else {
      distances[position++] =
          static_cast<Real>(strided_distance(t, teacher.channel_stride, s, student.channel_stride, level.channels));
    }
  }
}

void distances_of(DType dtype, const Level& level, int64_t image, int64_t begin, int64_t end, void* distances) {
  switch (dtype) {
    case DType::kFloat32:
      return level_distances<float>(level, image, begin, end, static_cast<float*>(distances));
    case DType::kFloat64:
      return level_distances<double>(level, image, begin, end, static_cast<double*>(distances));
    case DType::kFloat16:
      return level_distances<Half>(level, image, begin, end, static_cast<float*>(distances));
    case DType::kBFloat16:
      return level_distances<BFloat16>(level, image, begin, end, static_cast<float*>(distances));
  }
}

/// Stretches one row of distances to the width of the map.
template <class Real>
void stretch_row(const Real* row, const Columns& columns, int64_t width, Real* stretched) {
  const Real* low_weight = static_cast<const Real*>(columns.low_weight);
  const Real* high_weight = static_cast<const Real*>(columns.high_weight);
#pragma omp simd
  for (int64_t x = 0; x < width; ++x)
    stretched[x] = low_weight[x] * row[columns.low[x]] + high_weight[x] * row[columns.high[x]];
}

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

template <class Real>
double map_rows(const AnomalyMapParams& params, const void* const* distances, const Columns* columns, int64_t begin,
                int64_t end, Real* map, Real* scratch) {
  const int64_t width = params.width;
  StretchedRows<Real> stretched[kMaxLevels];
  for (int level = 0; level < params.num_levels; ++level)
    for (Real*& slot : stretched[level].slot) {
      slot = scratch;
      scratch += width;
    }

  Real maximum = -1;  // distances are not negative
  bool has_nan = false;
  for (int64_t y = begin; y < end; ++y) {
    Real* const out = map + y * width;
    for (int index = 0; index < params.num_levels; ++index) {
      const Level& level = params.levels[index];
      const Real* const level_distances = static_cast<const Real*>(distances[index]);
      const auto [low_row, high_row, low_weight, high_weight] = interpolation<Real>(y, level.height, params.height);
      const Real* const low = stretched[index].get(low_row, level_distances, level.width, columns[index], width);
      const Real* const high = stretched[index].get(high_row, level_distances, level.width, columns[index], width);
      const Real a = low_weight, b = high_weight;
      if (index == 0) {
#pragma omp simd
        for (int64_t x = 0; x < width; ++x) out[x] = a * low[x] + b * high[x];
      } else {
#pragma omp simd
        for (int64_t x = 0; x < width; ++x) out[x] *= a * low[x] + b * high[x];
      }
    }
    int row_has_nan = 0;
#pragma omp simd reduction(max : maximum) reduction(| : row_has_nan)
    for (int64_t x = 0; x < width; ++x) {
      maximum = out[x] > maximum ? out[x] : maximum;
      row_has_nan |= out[x] != out[x];
    }
    has_nan |= row_has_nan != 0;
  }
  return has_nan ? static_cast<double>(NAN) : static_cast<double>(maximum);
}

double rows_of(const AnomalyMapParams& params, const void* const* distances, const Columns* columns, int64_t begin,
               int64_t end, void* map, void* scratch) {
  if (params.dtype == DType::kFloat64)
    return map_rows(params, distances, columns, begin, end, static_cast<double*>(map), static_cast<double*>(scratch));
  return map_rows(params, distances, columns, begin, end, static_cast<float*>(map), static_cast<float*>(scratch));
}

}  // namespace

#define STFPM_EXT_CONCAT_(a, b) a##b
#define STFPM_EXT_CONCAT(a, b) STFPM_EXT_CONCAT_(a, b)
#define STFPM_EXT_STRING_(a) #a
#define STFPM_EXT_STRING(a) STFPM_EXT_STRING_(a)

extern const Kernels STFPM_EXT_CONCAT(kernels_, STFPM_EXT_ISA);
const Kernels STFPM_EXT_CONCAT(kernels_, STFPM_EXT_ISA) = {STFPM_EXT_STRING(STFPM_EXT_ISA), distances_of, rows_of};

}  // namespace stfpm_ext
