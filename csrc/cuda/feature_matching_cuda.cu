// SPDX-License-Identifier: Apache-2.0
//
// The loss on CUDA: one launch forward, one backward. Forward, each block adds up its own tiles, and after a barrier
// the first block adds up the blocks, so that the sum has one order on any one device. Nothing here waits for the
// device: the upstream gradient is read where it is.

#include <cooperative_groups.h>

#include <algorithm>

#include "../feature_matching.h"
#include "dot_products.cuh"
#include "launch.cuh"

namespace stfpm_ext {
namespace {

struct MatchingLaunch {
  FeatureMatchingParams params;
  Tiling tiling;
  double share[kMaxLevels];  // of each position in the loss: 1 / (batch * height * width)
};

struct ForwardLaunch : MatchingLaunch {
  void* loss;
  double* partial_sums;
};

struct BackwardLaunch : MatchingLaunch {
  const void* upstream;
  MutableFeatures gradients[kMaxLevels];
};

/// The factors of a tile's image at its level; the projections are `tiling.positions` further on, the values twice.
template <class Real>
__device__ Real* factors_of(const MatchingLaunch& launch, const Tile& tile) {
  const Level& level = launch.params.levels[tile.level];
  return static_cast<Real*>(launch.params.scalars) + launch.tiling.offset[tile.level] +
         tile.image * level.height * level.width;
}

union MatchingShared {
  PartialDotProducts partial;
  double sums[kWarps];
};

/// The sum over a block's threads, for thread 0.
__device__ double sum_of_block(double value, double (&sums)[kWarps]) {
#pragma unroll
  for (int lane_bit = kWarp / 2; lane_bit > 0; lane_bit /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane_bit);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = sums[0];
  for (int other = 1; other < kWarps; ++other) value += sums[other];
  return value;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    feature_matching_kernel(const __grid_constant__ ForwardLaunch launch) {
  using Real = RealOf<T>;
  STFPM_EXT_SHARED(MatchingShared, shared);
  const Tiling& tiling = launch.tiling;
  double sum = 0;
  const int images = static_cast<int>(launch.params.batch);
  for (int i = blockIdx.x; i < images * tiling.tiles_per_image; i += gridDim.x) {
    const Tile tile = tile_of(tiling, launch.params.num_levels, images, i);
    Real* const factors = factors_of<Real>(launch, tile);
    dot_products_of_tile<T>(
        tiling, launch.params.levels, tile, shared.partial, [&](int position, const DotProducts& products) {
          const Matching one = matching(products.teacher_teacher, products.student_student, products.teacher_student);
          factors[position] = static_cast<Real>(one.factor);
          factors[position + tiling.positions] = static_cast<Real>(one.projection);
          factors[position + 2 * tiling.positions] = static_cast<Real>(one.value);
          sum += one.value * launch.share[tile.level];
        });
  }
  sum = sum_of_block(sum, shared.sums);
  if (threadIdx.x == 0) launch.partial_sums[blockIdx.x] = sum;
  cooperative_groups::this_grid().sync();
  if (blockIdx.x != 0) return;
  double total = 0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) total += launch.partial_sums[block];
  total = sum_of_block(total, shared.sums);
  if (threadIdx.x == 0) *static_cast<Real*>(launch.loss) = static_cast<Real>(total);
}

template <class Real, class T>
__device__ Real to_real(T value) {
  if constexpr (std::is_same_v<T, Real>)
    return value;
  else if constexpr (std::is_same_v<T, __half>)
    return __half2float(value);
  else
    return __bfloat162float(value);
}

__device__ void from_real(float value, float& target) { target = value; }
__device__ void from_real(double value, double& target) { target = value; }
__device__ void from_real(float value, __half& target) { target = __float2half(value); }
__device__ void from_real(float value, __nv_bfloat16& target) { target = __float2bfloat16(value); }

/// 1 value, or as many as 16 bytes hold, by one store. The next operator reads them: they may stay in the caches.
template <int kCount, class T>
__device__ void store(const T (&values)[kCount], T* target) {
  if constexpr (kCount == 1) {
    *target = values[0];
  } else {
    uint4 bytes;
    static_assert(sizeof bytes == sizeof values);
    memcpy(&bytes, values, sizeof bytes);
    *reinterpret_cast<uint4*>(target) = bytes;
  }
}

/// The gradients of a tile, by the same threads as forward: one of `kLanes` positions or vectors of them, or one of
/// `kLanes` vectors of channels of a position (kChannelsLast).
template <int kVector, bool kIsChannelsLast, class T>
__device__ void gradients_of_tile(const BackwardLaunch& launch, const Tile& tile) {
  using Real = RealOf<T>;
  constexpr int kTile = kIsChannelsLast ? kChannelsLastTile<kVector> : kPlaneTile<kVector>;
  constexpr int kPositions = kIsChannelsLast ? 1 : kVector;  // of a thread
  constexpr int kLanes = kTile / kPositions, kSlots = kThreads / kLanes;
  const Level& level = launch.params.levels[tile.level];
  const MutableFeatures& target = launch.gradients[tile.level];
  const int lane = kIsChannelsLast ? threadIdx.x / kSlots : threadIdx.x % kLanes;
  const int slot = kIsChannelsLast ? threadIdx.x % kSlots : threadIdx.x / kLanes;
  const int position = tile.index * kTile + lane * kPositions;
  if (position >= level.height * level.width) return;

  const Real scale =
      static_cast<Real>(static_cast<double>(*static_cast<const Real*>(launch.upstream)) * launch.share[tile.level]);
  const Real* const factors = factors_of<Real>(launch, tile) + position;
  Real factor[kPositions], projection[kPositions];
#pragma unroll
  for (int i = 0; i < kPositions; ++i) {
    factor[i] = factors[i] * scale;
    projection[i] = factors[i + launch.tiling.positions];
  }
  const T* const teacher = channels_of<const T>(level.teacher, level, tile.image, position);
  const T* const student = channels_of<const T>(level.student, level, tile.image, position);
  T* const gradients = channels_of<T>(target, level, tile.image, position);
  constexpr int kChannels = kIsChannelsLast ? kVector : 1;  // of a load
  for_each_channel<kVector, kSlots * kChannels>(
      teacher, level.teacher.channel_stride, student, level.student.channel_stride, slot * kChannels, level.channels,
      [&](int64_t channel, const auto& t, const auto& s) {
        T g[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          from_real(matching_gradient(factor[i % kPositions], projection[i % kPositions], to_real<Real>(t[i]),
                                      to_real<Real>(s[i])),
                    g[i]);
        store<kVector>(g, gradients + channel * target.channel_stride);
      });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    feature_matching_backward_kernel(const __grid_constant__ BackwardLaunch launch) {
  constexpr int kVector = sizeof(uint4) / sizeof(T);
  const Tiling& tiling = launch.tiling;
  const int images = static_cast<int>(launch.params.batch);
  for (int i = blockIdx.x; i < images * tiling.tiles_per_image; i += gridDim.x) {
    const Tile tile = tile_of(tiling, launch.params.num_levels, images, i);
    switch (tiling.layout[tile.level]) {
      case Layout::kPlanes:
        gradients_of_tile<kVector, false, T>(launch, tile);
        break;
      case Layout::kChannelsLast:
        gradients_of_tile<kVector, true, T>(launch, tile);
        break;
      case Layout::kStrided:
        gradients_of_tile<1, false, T>(launch, tile);
        break;
    }
  }
}

// ---- host

/// `gradients`: of each level, where they are written; null forward.
template <class T>
void prepare(MatchingLaunch& launch, const FeatureMatchingParams& params, const MutableFeatures* gradients) {
  launch.params = params;
  for (int index = 0; index < params.num_levels; ++index) {
    const Level& level = params.levels[index];
    const Layout layout =
        gradients == nullptr ? layout_of<T>(level, params.batch) : layout_of<T>(level, params.batch, gradients[index]);
    add_level<T>(launch.tiling, index, level, params.batch, layout);
    launch.share[index] = 1.0 / static_cast<double>(params.batch * level.height * level.width);
  }
  check_batch(params.batch, launch.tiling.tiles_per_image);
}

template <class T>
void enqueue_forward(const FeatureMatchingParams& params, void* loss, double* partial_sums, int device,
                     cudaStream_t stream) {
  ForwardLaunch launch{};
  prepare<T>(launch, params, nullptr);
  launch.loss = loss;
  launch.partial_sums = partial_sums;
  attributes_of(feature_matching_kernel<T>, device);
  const int64_t processors = attribute_of(device, cudaDevAttrMultiProcessorCount);
  const int64_t blocks = std::min({params.batch * launch.tiling.tiles_per_image, kBlocksPerProcessor * processors,
                                   int64_t{kMostPartialSums}});  // all of which run at once, by the launch bounds
  cudaLaunchAttribute attribute = cooperative();
  launch_kernel(feature_matching_kernel<T>, launch, launch_config(blocks, stream, &attribute));
}

template <class T>
void enqueue_backward(const FeatureMatchingParams& params, const void* upstream, const MutableFeatures* gradients,
                      int device, cudaStream_t stream) {
  BackwardLaunch launch{};
  prepare<T>(launch, params, gradients);
  launch.upstream = upstream;
  std::copy(gradients, gradients + params.num_levels, launch.gradients);
  attributes_of(feature_matching_backward_kernel<T>, device);
  const int64_t blocks = params.batch * launch.tiling.tiles_per_image;
  launch_kernel(feature_matching_backward_kernel<T>, launch, launch_config(blocks, stream, nullptr));
}

}  // namespace

void feature_matching_cuda(const FeatureMatchingParams& params, void* loss, double* partial_sums, int device,
                           void* stream) {
  with_type_on(device, params.dtype, [&](auto element) {
    enqueue_forward<decltype(element)>(params, loss, partial_sums, device, static_cast<cudaStream_t>(stream));
  });
}

void feature_matching_backward_cuda(const FeatureMatchingParams& params, const void* upstream,
                                    const MutableFeatures* gradients, int device, void* stream) {
  with_type_on(device, params.dtype, [&](auto element) {
    enqueue_backward<decltype(element)>(params, upstream, gradients, device, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace stfpm_ext
