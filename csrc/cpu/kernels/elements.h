// SPDX-License-Identifier: Apache-2.0
//
// The element types, and how features lie in memory. Part of kernels.cpp, as all of this folder.

#pragma once

#include <cstring>

#include "../../levels.h"

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

/// Likewise. A normal half has the float's exponent less 112, and the fraction without its last 13 bits, rounded in
/// integers. For a subnormal half, the float is rounded by adding 0.5, whose last place is the half's, 2^-24.
inline void store(double value, Half& target) {
  const uint32_t bits = bits_of(static_cast<float>(value)), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_from_bits(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t half = magnitude > 0x7f800000u ? 0x7e00u : magnitude >= (143u << 23) ? 0x7c00u : finite;
  target.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
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

/// Whether the positions of a row, or even of the whole level, are neighbours in memory.
template <class AnyFeatures>
bool columns_adjacent(const Level& level, const AnyFeatures& features) {
  return level.width == 1 || features.column_stride == 1;
}
template <class AnyFeatures>
bool rows_adjacent(const Level& level, const AnyFeatures& features) {
  return level.height == 1 || features.row_stride == level.width;
}

/// Fetches positions [begin, end) of some channels into the second-level cache, before their turn comes.
template <int kChannels, class T>
void prefetch_channels(const T* features, int64_t stride, int64_t begin, int64_t end) {
#ifdef __GNUC__
  constexpr int64_t kPerLine = 64 / sizeof(T);
  for (int channel = 0; channel < kChannels; ++channel)
    for (int64_t i = begin; i < end; i += kPerLine) __builtin_prefetch(features + channel * stride + i, 0, 2);
#else
  (void)features, (void)stride, (void)begin, (void)end;
#endif
}

template <int kCount>
struct Lot {
  static constexpr int count = kCount;
};

/// Calls `work(Lot<n>, channel, begin, end)` for lots of channels, and in each for stretches of the `count` positions,
/// which are neighbours in memory.
template <class T, class Work>
void for_each_lot(const T* teacher, int64_t teacher_stride, const T* student, int64_t student_stride, int64_t channels,
                  int64_t count, const Work& work) {
  constexpr int kLot = 4;
  constexpr int64_t kStretch = 128;
  const int64_t whole_lots = channels - channels % kLot;
  for (int64_t channel = 0; channel < whole_lots; channel += kLot) {
    for (int64_t begin = 0, end; begin < count; begin = end) {
      end = count - begin < kStretch ? count : begin + kStretch;
      // The hardware's own prefetching does not follow so many short streams.
      if (channel + kLot < whole_lots) {
        prefetch_channels<kLot>(teacher + (channel + kLot) * teacher_stride, teacher_stride, begin, end);
        prefetch_channels<kLot>(student + (channel + kLot) * student_stride, student_stride, begin, end);
      }
      work(Lot<kLot>(), channel, begin, end);
    }
  }
  for (int64_t channel = whole_lots; channel < channels; ++channel) work(Lot<1>(), channel, int64_t{0}, count);
}

}  // namespace
}  // namespace stfpm_ext
