// SPDX-License-Identifier: Apache-2.0
//
// The first phase of scorer and loss: a block reads a tile and sums up the dot products of its positions.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "../distance_math.h"
#include "tiling.cuh"

namespace stfpm_ext {
namespace {

#ifndef STFPM_EXT_SHARED  // tests/ops/cuda_on_threads has its own
#define STFPM_EXT_SHARED(Type, name) __shared__ Type name
#endif

template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ double to_double(float value) { return value; }
__device__ double to_double(double value) { return value; }
__device__ double to_double(__half value) { return __half2float(value); }
__device__ double to_double(__nv_bfloat16 value) { return __bfloat162float(value); }

/// 1 value, or as many as 16 bytes hold, by one load. Each feature is read once: it need not stay in the caches.
template <int kCount, class T>
__device__ void load(const T* source, T (&values)[kCount]) {
  if constexpr (kCount == 1) {
    values[0] = *source;
  } else {
    static_assert(kCount * sizeof(T) == sizeof(uint4));
    const uint4 bytes = __ldcs(reinterpret_cast<const uint4*>(source));
    memcpy(values, &bytes, sizeof bytes);
  }
}

/// Calls `use(channel, t, s)` with kVector features of both sides, for every kStep-th channel from `channel` on. Loads
/// go in groups, each group ahead of its arithmetic: a loop that the compiler unrolls keeps its exits between the
/// loads, and so only one channel in flight.
template <int kVector, int kStep, class T, class Use>
__device__ void for_each_channel(const T* teacher, int64_t teacher_stride, const T* student, int64_t student_stride,
                                 int64_t channel, int64_t channels, const Use& use) {
  const auto group = [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    T t[kSize][kVector], s[kSize][kVector];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      load<kVector>(teacher + (channel + i * kStep) * teacher_stride, t[i]);
      load<kVector>(student + (channel + i * kStep) * student_stride, s[i]);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) use(channel + i * kStep, t[i], s[i]);
    channel += kSize * kStep;
  };
#pragma unroll 1
  while (channel + 3 * kStep < channels) group(std::integral_constant<int, 4>());
  if (channel + kStep < channels) group(std::integral_constant<int, 2>());
  if (channel < channels) group(std::integral_constant<int, 1>());
}

/// The three dot products of one position.
struct DotProducts {
  double teacher_teacher, student_student, teacher_student;

  __device__ void add(double t, double s) {
    teacher_teacher = multiply_add(t, t, teacher_teacher);
    student_student = multiply_add(s, s, student_student);
    teacher_student = multiply_add(t, s, teacher_student);
  }
  __device__ void add(const DotProducts& other) {
    teacher_teacher += other.teacher_teacher;
    student_student += other.student_student;
    teacher_student += other.teacher_student;
  }
  /// Adds those of the lane whose number differs in one bit; both get the sum.
  __device__ void add_lane(int lane_bit) {
    teacher_teacher += __shfl_xor_sync(0xffffffffu, teacher_teacher, lane_bit);
    student_student += __shfl_xor_sync(0xffffffffu, student_student, lane_bit);
    teacher_student += __shfl_xor_sync(0xffffffffu, teacher_student, lane_bit);
  }
};

using PartialDotProducts = DotProducts[kWarps][kMostPositions];

/// Where the channels of a position begin.
template <class T, class AnyFeatures>
__device__ T* channels_of(const AnyFeatures& features, const Level& level, int64_t image, int position) {
  const int width = static_cast<int>(level.width), row = position / width, column = position % width;
  return static_cast<T*>(features.data) + image * features.batch_stride + row * features.row_stride +
         column * features.column_stride;
}

/// Dot products of a tile of positions: lanes side by side read neighbouring positions, and the rest of the block's
/// threads other channels, whose sums meet first in the warp and then in shared memory. One thread calls
/// `use(position, sum)` for each position.
template <int kVector, class T, class Use>
__device__ void dot_products_of_planes(const Level& level, int64_t image, int first, PartialDotProducts& partial,
                                       const Use& use) {
  constexpr int kTile = kPlaneTile<kVector>, kLanes = kTile / kVector, kSlots = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes, slot = threadIdx.x / kLanes;
  const int positions = static_cast<int>(level.height * level.width), position = first + lane * kVector;
  DotProducts sums[kVector] = {};
  if (position < positions) {
    const T* const teacher = channels_of<const T>(level.teacher, level, image, position);
    const T* const student = channels_of<const T>(level.student, level, image, position);
    const auto add = [&](int64_t, const auto& t, const auto& s) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[i].add(to_double(t[i]), to_double(s[i]));
    };
    for_each_channel<kVector, kSlots>(teacher, level.teacher.channel_stride, student, level.student.channel_stride,
                                      slot, level.channels, add);
  }
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
#pragma unroll
    for (int lane_bit = kLanes; lane_bit < kWarp; lane_bit *= 2) sums[i].add_lane(lane_bit);
    if (threadIdx.x % kWarp < kLanes) partial[warp][lane * kVector + i] = sums[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTile && i < positions - first; i += kThreads) {
    DotProducts sum = partial[0][i];
    for (int other = 1; other < kWarps; ++other) sum.add(partial[other][i]);
    use(first + i, sum);
  }
  __syncthreads();
}

/// The same where the channels are neighbours: a few lanes for each position.
template <int kVector, class T, class Use>
__device__ void dot_products_of_channels_last(const Level& level, int64_t image, int first, const Use& use) {
  constexpr int kLanes = kChannelLanes<kVector>;
  const int lane = threadIdx.x % kLanes, position = first + static_cast<int>(threadIdx.x) / kLanes;
  const bool inside = position < level.height * level.width;
  DotProducts sum{};
  if (inside) {
    const T* const teacher = channels_of<const T>(level.teacher, level, image, position);
    const T* const student = channels_of<const T>(level.student, level, image, position);
    const auto add = [&](int64_t, const auto& t, const auto& s) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum.add(to_double(t[i]), to_double(s[i]));
    };
    for_each_channel<kVector, kLanes * kVector>(teacher, 1, student, 1, lane * kVector, level.channels, add);
  }
#pragma unroll
  for (int lane_bit = kLanes / 2; lane_bit > 0; lane_bit /= 2) sum.add_lane(lane_bit);
  if (inside && lane == 0) use(position, sum);
}

template <class T, class Use>
__device__ void dot_products_of_tile(const Tiling& tiling, const Level* levels, const Tile& tile,
                                     PartialDotProducts& partial, const Use& use) {
  constexpr int kVector = sizeof(uint4) / sizeof(T);
  const Level& level = levels[tile.level];
  switch (tiling.layout[tile.level]) {
    case Layout::kPlanes:
      return dot_products_of_planes<kVector, T>(level, tile.image, tile.index * kPlaneTile<kVector>, partial, use);
    case Layout::kChannelsLast:
      return dot_products_of_channels_last<kVector, T>(level, tile.image, tile.index * kChannelsLastTile<kVector>, use);
    case Layout::kStrided:
      return dot_products_of_planes<1, T>(level, tile.image, tile.index * kPlaneTile<1>, partial, use);
  }
}

}  // namespace
}  // namespace stfpm_ext
