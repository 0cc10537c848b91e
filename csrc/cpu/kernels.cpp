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

/// Exact for every half, in arithmetic that compilers vectorise: a float of the same fraction, whose exponent is too
/// small by 112 until it is multiplied by 2^112 (subnormals too); what comes out beyond all halves is infinity or NaN.
inline double load(Half value) {
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;
  const float finite = float_from_bits(magnitude) * 0x1p112f;
  const float unsigned_value = finite < 65536.0f ? finite : float_from_bits(magnitude | 0x7f800000u);
  return static_cast<double>(value.bits & 0x8000u ? -unsigned_value : unsigned_value);
}

inline void store(double value, float& target) { target = static_cast<float>(value); }
inline void store(double value, double& target) { target = value; }

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

/// Rounds to the nearest, ties to even; NaN stays NaN.
inline void store(double value, BFloat16& target) {
  const uint32_t bits = bits_of(static_cast<float>(value));
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  target.bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

/// Likewise. A half's fraction is what is left of a float's when a number is added to it whose last place is the
/// half's: 2^13 times the power of two of a normal half, and 0.5, whose last place is 2^-24, for the subnormal ones.
inline void store(double value, Half& target) {
  const uint32_t bits = bits_of(static_cast<float>(value)), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_from_bits(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t half = magnitude > 0x7f800000u ? 0x7e00u : magnitude >= (143u << 23) ? 0x7c00u : finite;
  target.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

/// Features of one image with the element type known: const where they are read.
template <class T>
struct Plane {
  T* data;
  int64_t channel_stride, row_stride, column_stride;

  template <class AnyFeatures>
  Plane(const AnyFeatures& features, int64_t image)
      : data(static_cast<T*>(features.data) + image * features.batch_stride),
        channel_stride(features.channel_stride),
        row_stride(features.row_stride),
        column_stride(features.column_stride) {}

  T* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
};

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

/// Asks for positions [begin, end) of some channels, to be in the second-level cache when their turn comes.
template <int kChannels, class T>
void prefetch_channels(const T* features, int64_t stride, int64_t begin, int64_t end) {
  constexpr int64_t kPerLine = 64 / sizeof(T);
  for (int channel = 0; channel < kChannels; ++channel)
    for (int64_t i = begin; i < end; i += kPerLine) __builtin_prefetch(features + channel * stride + i, 0, 2);
}

template <int kCount>
struct Lot {
  static constexpr int count = kCount;
};

/// Calls `work(Lot<n>, channel, begin, end)` for lots of channels, and for stretches of positions in each, of `count`
/// that are neighbours in memory.
template <class T, class Work>
void for_each_lot(const T* teacher, int64_t teacher_stride, const T* student, int64_t student_stride, int64_t channels,
                  int64_t count, const Work& work) {
  constexpr int kLot = 4;
  constexpr int64_t kStretch = 128;
  const int64_t whole_lots = channels - channels % kLot;
  for (int64_t channel = 0; channel < whole_lots; channel += kLot) {
    for (int64_t begin = 0, end; begin < count; begin = end) {
      end = count - begin < kStretch ? count : begin + kStretch;
      // So many streams, each of them short, are more than the hardware's own prefetching follows.
      if (channel + kLot < whole_lots) {
        prefetch_channels<kLot>(teacher + (channel + kLot) * teacher_stride, teacher_stride, begin, end);
        prefetch_channels<kLot>(student + (channel + kLot) * student_stride, student_stride, begin, end);
      }
      work(Lot<kLot>(), channel, begin, end);
    }
  }
  for (int64_t channel = whole_lots; channel < channels; ++channel) work(Lot<1>(), channel, int64_t{0}, count);
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

/// Adds up the lanes by halves. In registers, which compilers do not find for a loop: through memory, each half waits
/// for the last one's stores.
inline double sum_of_lanes(const double (&lanes)[kLanes]) {
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

/// Whether the positions of a row, or even of the whole level, are neighbours in memory.
template <class AnyFeatures>
bool columns_adjacent(const Level& level, const AnyFeatures& features) {
  return level.width == 1 || features.column_stride == 1;
}
template <class AnyFeatures>
bool rows_adjacent(const Level& level, const AnyFeatures& features) {
  return level.height == 1 || features.row_stride == level.width;
}

/// Sums up the dot products of positions [begin, end), kTile of them at most, of one row unless all rows are adjacent;
/// `use(position, count, sums)` gets them.
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

template <class T, class Real>
void level_distances(const Level& level, int64_t image, int64_t begin, int64_t end, Real* distances) {
  dot_products<T>(level, image, begin, end, [&](int64_t position, int64_t count, const DotProducts& sums) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      distances[position + i] = static_cast<Real>(
          half_squared_distance(sums.teacher_teacher[i], sums.student_student[i], sums.teacher_student[i]));
  });
}

/// Calls `use` with an element of the features' type and one of the results'.
template <class Use>
auto with_types(DType dtype, const Use& use) {
  switch (dtype) {
    case DType::kFloat64:
      return use(double(), double());
    case DType::kFloat16:
      return use(Half(), float());
    case DType::kBFloat16:
      return use(BFloat16(), float());
    case DType::kFloat32:
      break;
  }
  return use(float(), float());
}

void distances_of(DType dtype, const Level& level, int64_t image, int64_t begin, int64_t end, void* distances) {
  with_types(dtype, [&](auto element, auto real) {
    level_distances<decltype(element)>(level, image, begin, end, static_cast<decltype(real)*>(distances));
  });
}

template <class T, class Real>
double level_matching(const Level& level, int64_t image, int64_t begin, int64_t end, Real* factors, Real* projections) {
  double sum = 0;
  dot_products<T>(level, image, begin, end, [&](int64_t position, int64_t count, const DotProducts& sums) {
    double values[kTile];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const Matching one = matching(sums.teacher_teacher[i], sums.student_student[i], sums.teacher_student[i]);
      values[i] = one.value;
      factors[position + i] = static_cast<Real>(one.factor);
      projections[position + i] = static_cast<Real>(one.projection);
    }
    for (int64_t i = 0; i < count; ++i) sum += values[i];  // in this order, for every vector width
  });
  return sum;
}

double matching_of(DType dtype, const Level& level, int64_t image, int64_t begin, int64_t end, void* factors,
                   void* projections) {
  return with_types(dtype, [&](auto element, auto real) {
    return level_matching<decltype(element)>(level, image, begin, end, static_cast<decltype(real)*>(factors),
                                             static_cast<decltype(real)*>(projections));
  });
}

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
      if (channels_last)
        position_gradients(one_t, 1, one_s, 1, one_g, 1, level.channels, factor, projection);
      else
        position_gradients(one_t, teacher.channel_stride, one_s, student.channel_stride, one_g,
                           gradients.channel_stride, level.channels, factor, projection);
    }
  }
}

void matching_gradients_of(DType dtype, const Level& level, const MutableFeatures& gradients, int64_t image,
                           int64_t begin, int64_t end, const void* factors, const void* projections, double scale) {
  with_types(dtype, [&](auto element, auto real) {
    level_gradients<decltype(element)>(level, gradients, image, begin, end, static_cast<const decltype(real)*>(factors),
                                       static_cast<const decltype(real)*>(projections), scale);
  });
}

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

#if defined(__AVX2__) && defined(__GNUC__) && !defined(__clang__)
/// As above, a vector of pixels at a time: where they are no more than the distances they lie between, two loads and
/// two shuffles fetch those, at a fifth of the time of gather instructions.
inline void stretch_row(const float* row, const Columns& columns, int64_t width, float* stretched) {
#ifdef __AVX512F__
  constexpr int kLanes = 16;
#else
  constexpr int kLanes = 8;
#endif
  static_assert(kLanes <= kRowPadding);
  typedef float Floats __attribute__((vector_size(sizeof(float) * kLanes)));
  typedef int32_t Indices __attribute__((vector_size(sizeof(int32_t) * kLanes)));
  int64_t x = 0;
  for (; x + kLanes <= width; x += kLanes) {
    const int32_t first = columns.low[x];
    if (columns.high[x] == first || columns.high[x + kLanes - 1] > first + kLanes) {
      stretch_pixels(row, columns, x, x + kLanes, stretched);
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
    const Floats pixels = low_weight * __builtin_shuffle(from_first, low - first) +
                          high_weight * __builtin_shuffle(from_second, high - (first + 1));
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

/// Interpolates between two stretched rows and combines the result with the levels before.
template <class Real, class Combine>
void add_level_to_row(const Real* low, const Real* high, Real low_weight, Real high_weight, int64_t width,
                      Real* level_row, Real* row, bool first, Combine combine) {
  if (first) {
#pragma omp simd
    for (int64_t x = 0; x < width; ++x)
      row[x] = combine(Real(Combine::identity), low_weight * low[x] + high_weight * high[x]);
  } else {
#pragma omp simd
    for (int64_t x = 0; x < width; ++x) row[x] = combine(row[x], low_weight * low[x] + high_weight * high[x]);
  }
  if (level_row != nullptr) {
#pragma omp simd
    for (int64_t x = 0; x < width; ++x) level_row[x] = low_weight * low[x] + high_weight * high[x];
  }
}

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

  Real maximum = -1;  // distances are not negative
  bool has_nan = false;
  for (int64_t y = begin; y < end; ++y) {
    Real* const row = map + y * width;
    for (int index = 0; index < params.num_levels; ++index) {
      const Level& level = params.levels[index];
      const Real* const level_distances = static_cast<const Real*>(distances[index]);
      const auto source = interpolation<Real>(y, level.height, scale[index]);
      const Real* const low = stretched[index].get(source.low, level_distances, level.width, columns[index], width);
      const Real* const high = stretched[index].get(source.high, level_distances, level.width, columns[index], width);
      Real* const level_row =
          level_maps == nullptr ? nullptr : level_maps + (image * params.num_levels + index) * pixels + y * width;
      const auto add_level = [&](auto combine) {
        add_level_to_row(low, high, source.low_weight, source.high_weight, width, level_row, row, index == 0, combine);
      };
      if (params.combination == Combination::kSum)
        add_level(WeightedSum{level.weight});
      else if (params.combination == Combination::kMaximum)
        add_level(WeightedMaximum{level.weight});
      else if (level.weight == 1.0)
        add_level(Product{level.weight});
      else
        add_level(WeightedProduct{level.weight});
    }
    int row_has_nan = 0;
#pragma omp simd reduction(max : maximum) reduction(| : row_has_nan)
    for (int64_t x = 0; x < width; ++x) {
      maximum = row[x] > maximum ? row[x] : maximum;
      row_has_nan |= row[x] != row[x];
    }
    has_nan |= row_has_nan != 0;
  }
  return has_nan ? static_cast<double>(NAN) : static_cast<double>(maximum);
}

double rows_of(const AnomalyMapParams& params, const void* const* distances, const Columns* columns, int64_t image,
               int64_t begin, int64_t end, void* scratch) {
  if (params.dtype == DType::kFloat64)
    return map_rows(params, distances, columns, image, begin, end, static_cast<double*>(scratch));
  return map_rows(params, distances, columns, image, begin, end, static_cast<float*>(scratch));
}

}  // namespace

#define STFPM_EXT_CONCAT_(a, b) a##b
#define STFPM_EXT_CONCAT(a, b) STFPM_EXT_CONCAT_(a, b)
#define STFPM_EXT_STRING_(a) #a
#define STFPM_EXT_STRING(a) STFPM_EXT_STRING_(a)

extern const Kernels STFPM_EXT_CONCAT(kernels_, STFPM_EXT_ISA);
const Kernels STFPM_EXT_CONCAT(kernels_, STFPM_EXT_ISA) = {STFPM_EXT_STRING(STFPM_EXT_ISA), distances_of, rows_of,
                                                           matching_of, matching_gradients_of};

}  // namespace stfpm_ext
