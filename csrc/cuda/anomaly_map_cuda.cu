// SPDX-License-Identifier: Apache-2.0
//
// The scorer on CUDA: one launch, in which the blocks first share out the distances of all levels, meet at a barrier,
// and then share out the pixels (once more, where levels are combined at another size than the map's). docs/cuda.md has
// the reckoning behind tiles, threads and barrier.
//
// Distances pass through memory that the caller supplies (0.5 % of the bytes for ResNet18; it stays in the L2 cache).
// Every sum has one order and the score is a maximum, so the result is the same to the bit from run to run.

#include <algorithm>
#include <stdexcept>

#include "../anomaly_map.h"
#include "features.cuh"

namespace stfpm_ext {
namespace {

constexpr int kClusterBlocks = 8;  // the most that every GPU with clusters has
constexpr int kRows = 4;           // of the map, that a thread computes at a time

/// One step from maps of the levels to pixels of one map.
struct PixelStep {
  AnomalyMapParams params;
  void* levels[kMaxLevels];               // their maps, [B, height, width] each
  int64_t column_units, units_per_image;  // of pixels
  double row_scale[kMaxLevels], column_scale[kMaxLevels];
};

/// What one launch needs.
struct Launch {
  Tiling tiling;
  PixelStep steps[2];  // the first reads the distances, the last writes the map
  int num_steps;
  bool clusters;  // a cluster of blocks for each image; otherwise all blocks for all images
};

template <class Real>
__device__ Real* level_of(const PixelStep& step, int index, int64_t image) {
  const Level& level = step.params.levels[index];
  return static_cast<Real*>(step.levels[index]) + image * level.height * level.width;
}

/// The blocks that meet at a barrier, and the images that are theirs.
struct Team {
  int64_t rank, size;
  int64_t first_image, images;
};

__device__ Team team_of(const Launch& launch) {
  if (launch.clusters) return {blockIdx.x % kClusterBlocks, kClusterBlocks, blockIdx.x / kClusterBlocks, 1};
  return {blockIdx.x, gridDim.x, 0, launch.steps[0].params.batch};
}

__device__ void team_barrier(const Launch& launch) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (launch.clusters) return cooperative_groups::this_cluster().sync();
#endif
  cooperative_groups::this_grid().sync();
}

template <class Real>
struct Shared {
  union {
    PartialDotProducts partial;                   // while distances are computed
    Interpolation<Real> rows[kMaxLevels][kRows];  // while pixels are
  };
};

template <class T, class Real>
__device__ void distances_of_tile(const Launch& launch, int64_t image, int64_t index, Shared<Real>& shared) {
  const AnomalyMapParams& params = launch.steps[0].params;
  const Tile tile = tile_of(launch.tiling, params.num_levels, index);
  Real* const distances = level_of<Real>(launch.steps[0], tile.level, image);
  dot_products_of_tile<T>(
      launch.tiling, params.levels, image, tile, shared.partial, [&](int64_t position, const DotProducts& sum) {
        distances[position] =
            static_cast<Real>(half_squared_distance(sum.teacher_teacher, sum.student_student, sum.teacher_student));
      });
}

/// A number that is not negative, as an integer of the same order; every NaN is the largest.
__device__ unsigned int ordered_bits(float value) {
  return value != value ? 0x7fffffffu : __float_as_uint(value) & 0x7fffffffu;
}
__device__ unsigned long long ordered_bits(double value) {
  return value != value ? 0x7fffffffffffffffull
                        : static_cast<unsigned long long>(__double_as_longlong(value)) & 0x7fffffffffffffffull;
}

/// One pixel of each of kRows rows of the map: a thread for each column. Returns their maximum, as ordered bits.
template <class Combine, class Real>
__device__ auto map_of_column(const PixelStep& step, int64_t image, int64_t first_row, int64_t column,
                              const Shared<Real>& shared) {
  const AnomalyMapParams& params = step.params;
  const int64_t pixels = params.height * params.width;
  Real combined[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) combined[i] = Combine::identity;
  for (int index = 0; index < params.num_levels; ++index) {
    const Level& level = params.levels[index];
    const Real* const level_map = level_of<Real>(step, index, image);
    const auto x = interpolation<Real>(column, level.width, step.column_scale[index]);
    const auto stretched = [&](int64_t row) {
      const Real* const samples = level_map + row * level.width;
      return x.low_weight * samples[x.low] + x.high_weight * samples[x.high];
    };
    Combine combine{level.weight};
    int64_t low_row = -1, high_row = -1;
    Real low = 0, high = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first_row + i < params.height) {
        const Interpolation<Real>& y = shared.rows[index][i];
        if (y.low != low_row) low = y.low == high_row ? high : stretched(y.low);
        low_row = y.low;
        if (y.high != high_row) high = y.high == low_row ? low : stretched(y.high);
        high_row = y.high;
        const Real pixel = y.low_weight * low + y.high_weight * high;
        combined[i] = combine(combined[i], pixel);
        if (params.level_maps != nullptr)
          static_cast<Real*>(params.level_maps)[(image * params.num_levels + index) * pixels +
                                                (first_row + i) * params.width + column] = pixel;
      }
    }
  }
  auto maximum = ordered_bits(Real(0));
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (first_row + i < params.height) {
      static_cast<Real*>(params.map)[image * pixels + (first_row + i) * params.width + column] = combined[i];
      const auto bits = ordered_bits(combined[i]);
      maximum = bits > maximum ? bits : maximum;
    }
  }
  return maximum;
}

/// A unit of pixels, kRows rows of kThreads columns of one image, and in the last step its part in the image's score.
template <class Combine, class Real>
__device__ void map_of_unit(const PixelStep& step, bool last, int64_t image, int64_t unit, Shared<Real>& shared) {
  using Bits = decltype(ordered_bits(Real(0)));
  const AnomalyMapParams& params = step.params;
  const int64_t first_row = unit / step.column_units * kRows;
  const int64_t column = unit % step.column_units * kThreads + threadIdx.x;
  __syncthreads();
  for (int i = threadIdx.x; i < params.num_levels * kRows; i += kThreads) {
    const int index = i / kRows, row = i % kRows;
    shared.rows[index][row] = interpolation<Real>(first_row + row, params.levels[index].height, step.row_scale[index]);
  }
  __syncthreads();
  Bits maximum = column < params.width ? map_of_column<Combine>(step, image, first_row, column, shared) : 0;
  if (!last) return;
#pragma unroll
  for (int lane_bit = kWarp / 2; lane_bit > 0; lane_bit /= 2) {
    const Bits other = __shfl_xor_sync(0xffffffffu, maximum, lane_bit);
    maximum = other > maximum ? other : maximum;
  }
  if (threadIdx.x % kWarp == 0) atomicMax(static_cast<Bits*>(params.score) + image, maximum);
}

template <class T, class Combine>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    anomaly_map_kernel(const __grid_constant__ Launch launch) {
  STFPM_EXT_SHARED(Shared<RealOf<T>>, shared);
  const Team team = team_of(launch);
  if (team.rank == 0)
    for (int64_t i = threadIdx.x; i < team.images; i += kThreads)
      static_cast<RealOf<T>*>(launch.steps[0].params.score)[team.first_image + i] = 0;
  for (int64_t i = team.rank; i < team.images * launch.tiling.tiles_per_image; i += team.size)
    distances_of_tile<T>(launch, team.first_image + i / launch.tiling.tiles_per_image,
                         i % launch.tiling.tiles_per_image, shared);
#pragma unroll 1
  for (int index = 0; index < launch.num_steps; ++index) {
    const PixelStep& step = launch.steps[index];
    team_barrier(launch);
    for (int64_t i = team.rank; i < team.images * step.units_per_image; i += team.size)
      map_of_unit<Combine>(step, index == launch.num_steps - 1, team.first_image + i / step.units_per_image,
                           i % step.units_per_image, shared);
  }
}

// ---- host

/// A step that finds the maps of its levels one after the other, from `maps` on.
template <class Real>
PixelStep pixel_step(const AnomalyMapParams& params, Real* maps) {
  PixelStep step{};
  step.params = params;
  for (int index = 0; index < params.num_levels; ++index) {
    const Level& level = params.levels[index];
    step.levels[index] = maps;
    maps += params.batch * level.height * level.width;
    step.row_scale[index] = interpolation_scale(level.height, params.height);
    step.column_scale[index] = interpolation_scale(level.width, params.width);
  }
  step.column_units = ceil_div(params.width, kThreads);
  step.units_per_image = ceil_div(params.height, kRows) * step.column_units;
  return step;
}

template <class T>
Launch prepare(const AnomalyMapParams& params, void* scratch) {
  Launch launch{};
  for (int index = 0; index < params.num_levels; ++index) {
    const Level& level = params.levels[index];
    add_level<T>(launch.tiling, index, level, params.batch, layout_of<T>(level, params.batch));
  }
  RealOf<T>* const distances = static_cast<RealOf<T>*>(scratch);
  RealOf<T>* const combined = distances + launch.tiling.positions;
  if (combines_in_map(params)) {
    launch.steps[launch.num_steps++] = pixel_step(params, distances);
  } else {
    launch.steps[launch.num_steps++] = pixel_step(combining_step(params, combined), distances);
    launch.steps[launch.num_steps++] = pixel_step(upsampling_step(params), combined);
  }
  return launch;
}

template <class T>
auto kernel_for(const AnomalyMapParams& params) {
  if (params.combination == Combination::kSum) return anomaly_map_kernel<T, WeightedSum>;
  if (params.combination == Combination::kMaximum) return anomaly_map_kernel<T, WeightedMaximum>;
  const bool weighted = std::any_of(params.levels, params.levels + params.num_levels,
                                    [](const Level& level) { return level.weight != 1.0; });
  return weighted ? anomaly_map_kernel<T, WeightedProduct> : anomaly_map_kernel<T, Product>;
}

cudaLaunchAttribute in_clusters() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kClusterBlocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

/// Whether clusters, one for each image, fill the device up to the last of their waves.
template <class Kernel>
bool clusters_fill_the_device(Kernel* kernel, int64_t images) {
  cudaLaunchAttribute attribute = in_clusters();
  const cudaLaunchConfig_t config = launch_config(images * kClusterBlocks, nullptr, &attribute);
  int at_once = 0;
  if (cudaOccupancyMaxActiveClusters(&at_once, kernel, &config) != cudaSuccess) {
    cudaGetLastError();  // not for the next call to find
    return false;
  }
  return at_once > 0 && images * 10 >= ceil_div(images, at_once) * at_once * 9;
}

template <class T>
void enqueue(const AnomalyMapParams& params, void* scratch, int device, cudaStream_t stream) {
  Launch launch = prepare<T>(params, scratch);
  const auto kernel = kernel_for<T>(params);
  const int64_t processors = attribute_of(device, cudaDevAttrMultiProcessorCount);

  const cudaFuncAttributes code = attributes_of(kernel, device);

  // As docs/cuda.md reckons: a cluster for each image waits for nobody else, but must be many to fill the device.
  launch.clusters = code.ptxVersion >= 90 && params.batch * kClusterBlocks >= processors &&
                    clusters_fill_the_device(kernel, params.batch);
  int64_t blocks = params.batch * kClusterBlocks;
  if (!launch.clusters)
    blocks = std::min(
        params.batch * std::max(launch.tiling.tiles_per_image, launch.steps[launch.num_steps - 1].units_per_image),
        kBlocksPerProcessor * processors);  // all of which run at once, by the launch bounds
  if (blocks > INT32_MAX) throw std::invalid_argument("teacher: wanted a batch of at most 268435455 on CUDA");

  cudaLaunchAttribute attribute = launch.clusters ? in_clusters() : cooperative();
  launch_kernel(kernel, launch, launch_config(blocks, stream, &attribute));
}

}  // namespace

void anomaly_map_cuda(const AnomalyMapParams& params, void* scratch, int device, void* stream) {
  if (params.batch == 0) return;
  with_type_on(device, params.dtype, [&](auto element) {
    enqueue<decltype(element)>(params, scratch, device, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace stfpm_ext
