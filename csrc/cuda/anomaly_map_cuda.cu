// SPDX-License-Identifier: Apache-2.0
//
// The scorer on CUDA: one launch, in which the blocks first share out the distances of all levels, meet at a barrier,
// and then share out the pixels (once more, where levels are combined at another size than the map's). docs/cuda.md has
// the reckoning behind tiles, threads and barrier.
//
// Distances pass through memory that the caller supplies (0.5 % of the bytes for ResNet18; it stays in the L2 cache).
// Every sum has one order and the score is a maximum, so the result is the same to the bit from run to run.

#include <cooperative_groups.h>

#include <algorithm>

#include "../anomaly_map.h"
#include "dot_products.cuh"
#include "launch.cuh"

namespace stfpm_ext {
namespace {

constexpr int kClusterBlocks = 8;  // the most that every GPU with clusters has
constexpr int kRows = 16;          // the most of a map that a thread computes at a time

/// A level's distances, or what the first step combined, [B, height, width].
struct LevelMap {
  void* data;
  int64_t image_bytes;
  int height, width;
  double row_scale, column_scale, weight;
};

/// One step from maps of the levels to pixels of one map.
struct PixelStep {
  int num_levels;
  LevelMap levels[kMaxLevels];
  void* map;         // [B, height, width]
  void* level_maps;  // [B, num_levels, height, width], or null
  int height, width;
  int unit_rows, column_units, units_per_image;  // a unit is so many rows of kThreads columns of the map
};

/// What one launch needs.
struct Launch {
  AnomalyMapParams params;
  Tiling tiling;
  PixelStep steps[2];  // the first reads the distances, the last writes the map
  int num_steps;
  bool clusters;  // a cluster of blocks for each image; otherwise all blocks for all images
};

/// In bytes, since the compiler would add an offset in elements to every index instead of once to the address.
template <class Real>
__device__ Real* map_of(const LevelMap& level, int image) {
  return reinterpret_cast<Real*>(static_cast<char*>(level.data) + image * level.image_bytes);
}

/// The blocks that meet at a barrier, and the images that are theirs.
struct Team {
  int rank, size;
  int first_image, images;
};

__device__ Team team_of(const Launch& launch) {
  const int block = blockIdx.x, blocks = gridDim.x;
  if (launch.clusters) return {block % kClusterBlocks, kClusterBlocks, block / kClusterBlocks, 1};
  return {block, blocks, 0, static_cast<int>(launch.params.batch)};
}

__device__ void team_barrier(const Launch& launch) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (launch.clusters) return cooperative_groups::this_cluster().sync();
#endif
  cooperative_groups::this_grid().sync();
}

/// Two rows of a level, by the offsets of their first samples, and their weights in a row of the map.
template <class Real>
using Rows = Interpolation<Real, int>;

template <class Real>
struct Shared {
  union {
    PartialDotProducts partial;                      // while distances are computed
    alignas(16) Rows<Real> rows[kMaxLevels][kRows];  // while pixels are
  };
};

template <class T, class Real>
__device__ void distances_of_tile(const Launch& launch, const Tile& tile, Shared<Real>& shared) {
  Real* const distances = map_of<Real>(launch.steps[0].levels[tile.level], tile.image);
  dot_products_of_tile<T>(
      launch.tiling, launch.params.levels, tile, shared.partial, [&](int position, const DotProducts& sum) {
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

/// Computes a pixel in each of `rows` rows of the map: a thread for each column. Returns their maximum, as ordered
/// bits.
template <class Combine, bool kKeepsLevels, class Real>
__device__ auto map_of_column(const PixelStep& step, int image, int first_row, int rows, int column,
                              const Shared<Real>& shared) {
  const int pixels = step.height * step.width, first_pixel = first_row * step.width + column;
  typename Combine::template Partial<Real> combined[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) combined[i] = Combine::identity;
#pragma unroll 1
  for (int index = 0; index < step.num_levels; ++index) {
    const LevelMap& level = step.levels[index];
    const Real* const samples = map_of<Real>(level, image);
    const auto x = interpolation<Real>(column, level.width, level.column_scale);
    const auto stretched = [&](int offset) {
      return x.low_weight * samples[offset + x.low] + x.high_weight * samples[offset + x.high];
    };
    const int64_t first_of_level = (int64_t{image} * step.num_levels + index) * pixels + first_pixel;
    const Combine combine{level.weight};
    const bool counts = combine.counts();
    int row = -1;
    Real low = 0, high = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i == rows) break;
      const Rows<Real> y = shared.rows[index][i];
      if (y.low != row) {  // in all threads of the block or none
        row = y.low;
        low = stretched(y.low);
        high = stretched(y.high);
      }
      const Real pixel = y.low_weight * low + y.high_weight * high;
      if (counts) combined[i] = combine(combined[i], pixel);
      if constexpr (kKeepsLevels) static_cast<Real*>(step.level_maps)[first_of_level + i * step.width] = pixel;
    }
  }
  Real* const map = static_cast<Real*>(step.map) + int64_t{image} * pixels + first_pixel;
  auto maximum = ordered_bits(Real(0));
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (i == rows) break;
    const Real pixel = Combine::result(combined[i]);
    map[i * step.width] = pixel;
    const auto bits = ordered_bits(pixel);
    maximum = bits > maximum ? bits : maximum;
  }
  return maximum;
}

/// Computes a unit of one image's pixels and, where `score` is not null, raises the image's score to their maximum.
template <class Combine, class Real>
__device__ void map_of_unit(const PixelStep& step, int image, int unit, Real* score, Shared<Real>& shared) {
  using Bits = decltype(ordered_bits(Real(0)));
  const int first_row = unit / step.column_units * step.unit_rows;
  const int rows = min(step.unit_rows, step.height - first_row);
  const int column = unit % step.column_units * kThreads + static_cast<int>(threadIdx.x);
  __syncthreads();
  for (int i = threadIdx.x; i < step.num_levels * kRows; i += kThreads) {
    const LevelMap& level = step.levels[i / kRows];
    Rows<Real> y = interpolation<Real>(first_row + i % kRows, level.height, level.row_scale);
    y.low *= level.width;
    y.high *= level.width;
    shared.rows[i / kRows][i % kRows] = y;
  }
  __syncthreads();
  Bits maximum = 0;
  if (column < step.width)
    maximum = step.level_maps == nullptr ? map_of_column<Combine, false>(step, image, first_row, rows, column, shared)
                                         : map_of_column<Combine, true>(step, image, first_row, rows, column, shared);
  if (score == nullptr) return;
#pragma unroll
  for (int lane_bit = kWarp / 2; lane_bit > 0; lane_bit /= 2) {
    const Bits other = __shfl_xor_sync(0xffffffffu, maximum, lane_bit);
    maximum = other > maximum ? other : maximum;
  }
  if (threadIdx.x % kWarp == 0) atomicMax(reinterpret_cast<Bits*>(score) + image, maximum);
}

template <class T, class Combine>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    anomaly_map_kernel(const __grid_constant__ Launch launch) {
  using Real = RealOf<T>;
  STFPM_EXT_SHARED(Shared<Real>, shared);
  const Team team = team_of(launch);
  Real* const scores = static_cast<Real*>(launch.params.score);
  if (team.rank == 0)
    for (int i = threadIdx.x; i < team.images; i += kThreads) scores[team.first_image + i] = 0;
  for (int i = team.rank; i < team.images * launch.tiling.tiles_per_image; i += team.size) {
    Tile tile = tile_of(launch.tiling, launch.params.num_levels, team.images, i);
    tile.image += team.first_image;
    distances_of_tile<T>(launch, tile, shared);
  }
#pragma unroll 1
  for (int index = 0; index < launch.num_steps; ++index) {
    const PixelStep& step = launch.steps[index];
    const bool last = index == launch.num_steps - 1;
    team_barrier(launch);
    for (int i = team.rank; i < team.images * step.units_per_image; i += team.size)
      map_of_unit<Combine>(step, team.first_image + i / step.units_per_image, i % step.units_per_image,
                           last ? scores : nullptr, shared);
  }
}

// ---- host

/// A step that finds the maps of its levels one after the other, from `maps` on.
template <class Real>
PixelStep pixel_step(const AnomalyMapParams& params, Real* maps) {
  PixelStep step{};
  step.num_levels = params.num_levels;
  for (int index = 0; index < params.num_levels; ++index) {
    const Level& level = params.levels[index];
    step.levels[index] = {maps,
                          level.height * level.width * static_cast<int64_t>(sizeof(Real)),
                          static_cast<int>(level.height),
                          static_cast<int>(level.width),
                          interpolation_scale(level.height, params.height),
                          interpolation_scale(level.width, params.width),
                          level.weight};
    maps += params.batch * level.height * level.width;
  }
  step.map = params.map;
  step.level_maps = params.level_maps;
  step.height = static_cast<int>(params.height);
  step.width = static_cast<int>(params.width);
  step.column_units = static_cast<int>(ceil_div(params.width, kThreads));
  return step;
}

/// Cuts a step into units for `images` images and `blocks` blocks: as few rounds as rows per thread allow, all of them
/// full.
void cut_into_units(PixelStep& step, int64_t images, int64_t blocks) {
  const int64_t rows = images * step.height * step.column_units;
  const int64_t rounds = ceil_div(rows, blocks * kRows);
  step.unit_rows = static_cast<int>(ceil_div(rows, blocks * rounds));
  step.units_per_image = static_cast<int>(ceil_div(step.height, step.unit_rows)) * step.column_units;
}

template <class T>
Launch prepare(const AnomalyMapParams& params, void* scratch) {
  check_area("image_size", params.height, params.width);
  check_area("combine_size", params.combine_height, params.combine_width);
  Launch launch{};
  launch.params = params;
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
  return is_weighted_product(params) ? anomaly_map_kernel<T, WeightedProduct> : anomaly_map_kernel<T, Product>;
}

cudaLaunchAttribute in_clusters() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kClusterBlocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

/// Whether clusters, one for each image, fill the device, including the last of their waves, to nine tenths.
template <class Kernel>
bool clusters_fill_the_device(Kernel* kernel, int64_t images) {
  cudaLaunchAttribute attribute = in_clusters();
  const cudaLaunchConfig_t config = launch_config(images * kClusterBlocks, nullptr, &attribute);
  int at_once = 0;
  if (cudaOccupancyMaxActiveClusters(&at_once, kernel, &config) != cudaSuccess) {
    cudaGetLastError();  // so that the next call does not find it
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

  int64_t work = std::max(launch.tiling.tiles_per_image, kClusterBlocks);  // of an image
  for (const PixelStep& step : launch.steps) work = std::max<int64_t>(work, int64_t{step.height} * step.column_units);
  check_batch(params.batch, work);

  // As docs/cuda.md reckons: the cluster of an image waits for no other, but only many clusters fill the device.
  launch.clusters = code.ptxVersion >= 90 && params.batch * kClusterBlocks >= processors &&
                    clusters_fill_the_device(kernel, params.batch);
  const int64_t blocks =
      launch.clusters ? params.batch * kClusterBlocks : std::min(params.batch * work, kBlocksPerProcessor * processors);
  for (int index = 0; index < launch.num_steps; ++index) {
    if (launch.clusters)
      cut_into_units(launch.steps[index], 1, kClusterBlocks);
    else
      cut_into_units(launch.steps[index], params.batch, blocks);
  }
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

void try_cuda(int device) {
  with_type_on(device, DType::kFloat32, [&](auto) { attributes_of(anomaly_map_kernel<float, Product>, device); });
}

}  // namespace stfpm_ext
