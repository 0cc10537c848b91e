// SPDX-License-Identifier: Apache-2.0
//
// The scorer on CUDA: one launch, in which the blocks first share out the distances of all levels, meet at a barrier,
// and then share out the pixels. docs/cuda.md has the reckoning behind tiles, threads and barrier.
//
// Distances pass through memory that the caller supplies (0.5 % of the bytes for ResNet18; it stays in the L2 cache).
// Every sum has one order and the score is a maximum, so the result is the same to the bit from run to run.

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../anomaly_map.h"
#include "../anomaly_map_math.h"

namespace stfpm_ext {
namespace {

#ifndef STFPM_EXT_CUDA_THREADS
#define STFPM_EXT_CUDA_THREADS 256
#endif
#ifndef STFPM_EXT_SHARED  // tests/cuda_on_threads has its own
#define STFPM_EXT_SHARED(Type, name) __shared__ Type name
#endif

constexpr int kThreads = STFPM_EXT_CUDA_THREADS;  // of a block
constexpr int kBlocksPerProcessor = 2;            // enough loads in flight, with 128 registers for each thread
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLineLanes = 8;      // lanes that read a line of 128 bytes, 16 bytes each
constexpr int kClusterBlocks = 8;  // the most that every GPU with clusters has
constexpr int kRows = 4;           // of the map, that a thread computes at a time

/// How a level's features lie in memory, and so which way of reading them is coalesced.
enum class Layout {
  kPlanes,        // positions of a channel are neighbours, and 16-byte loads are aligned
  kChannelsLast,  // channels of a position are neighbours, and 16-byte loads are aligned
  kStrided,       // anything else
};

/// What one launch needs beyond the parameters of the call.
struct Launch {
  AnomalyMapParams params;
  void* distances;
  int64_t distance_offset[kMaxLevels];  // of each level's [B, H, W]
  Layout layout[kMaxLevels];
  int64_t tiles[kMaxLevels];  // of one image at each level
  int64_t tiles_per_image;
  int64_t column_units, units_per_image;  // of pixels
  double row_scale[kMaxLevels], column_scale[kMaxLevels];
  bool clusters;  // a cluster of blocks for each image; otherwise all blocks for all images
};

/// The blocks that meet at a barrier, and the images that are theirs.
struct Team {
  int64_t rank, size;
  int64_t first_image, images;
};

__device__ Team team_of(const Launch& launch) {
  if (launch.clusters) return {blockIdx.x % kClusterBlocks, kClusterBlocks, blockIdx.x / kClusterBlocks, 1};
  return {blockIdx.x, gridDim.x, 0, launch.params.batch};
}

__device__ void team_barrier(const Launch& launch) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (launch.clusters) return cooperative_groups::this_cluster().sync();
#endif
  cooperative_groups::this_grid().sync();
}

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
  __device__ double distance() const {
    return half_squared_distance(teacher_teacher, student_student, teacher_student);
  }
};

/// Positions of a tile when a lane reads kVector of them at once.
template <int kVector>
constexpr int kPlaneTile = kVector == 1 ? kWarp : kLineLanes * kVector;
constexpr int kChannelsLastTile = kThreads / kLineLanes;
constexpr int kMostPositions = kPlaneTile<8>;

template <class Real>
struct Shared {
  union {
    DotProducts partial[kWarps][kMostPositions];  // while distances are computed
    Interpolation<Real> rows[kMaxLevels][kRows];  // while pixels are
  };
};

/// Distances of a tile of positions: lanes side by side read neighbouring positions, and the rest of the block's
/// threads other channels, whose sums meet first in the warp and then in shared memory.
template <int kVector, class T, class Real>
__device__ void distances_of_planes(const Level& level, int64_t image, int64_t first, Real* distances,
                                    Shared<Real>& shared) {
  constexpr int kTile = kPlaneTile<kVector>, kLanes = kTile / kVector, kSlots = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes, slot = threadIdx.x / kLanes;
  const int64_t positions = level.height * level.width, position = first + lane * kVector;
  DotProducts sums[kVector] = {};
  if (position < positions) {
    const int64_t row = position / level.width, column = position % level.width;
    const auto start = [&](const Features& features) {
      return static_cast<const T*>(features.data) + image * features.batch_stride + row * features.row_stride +
             column * features.column_stride;
    };
    const T* const teacher = start(level.teacher);
    const T* const student = start(level.student);
#pragma unroll 4
    for (int64_t channel = slot; channel < level.channels; channel += kSlots) {
      T t[kVector], s[kVector];
      load<kVector>(teacher + channel * level.teacher.channel_stride, t);
      load<kVector>(student + channel * level.student.channel_stride, s);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[i].add(to_double(t[i]), to_double(s[i]));
    }
  }
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
#pragma unroll
    for (int lane_bit = kLanes; lane_bit < kWarp; lane_bit *= 2) sums[i].add_lane(lane_bit);
    if (threadIdx.x % kWarp < kLanes) shared.partial[warp][lane * kVector + i] = sums[i];
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < kTile && first + i < positions; i += kThreads) {
    DotProducts sum = shared.partial[0][i];
    for (int other = 1; other < kWarps; ++other) sum.add(shared.partial[other][i]);
    distances[first + i] = static_cast<Real>(sum.distance());
  }
  __syncthreads();
}

/// The same where the channels are neighbours: 8 lanes for each position.
template <int kVector, class T, class Real>
__device__ void distances_of_channels_last(const Level& level, int64_t image, int64_t first, Real* distances) {
  const int lane = threadIdx.x % kLineLanes;
  const int64_t position = first + threadIdx.x / kLineLanes;
  const bool inside = position < level.height * level.width;
  DotProducts sum{};
  if (inside) {
    const int64_t row = position / level.width, column = position % level.width;
    const auto start = [&](const Features& features) {
      return static_cast<const T*>(features.data) + image * features.batch_stride + row * features.row_stride +
             column * features.column_stride;
    };
    const T* const teacher = start(level.teacher);
    const T* const student = start(level.student);
#pragma unroll 4
    for (int64_t channel = lane * kVector; channel < level.channels; channel += kLineLanes * kVector) {
      T t[kVector], s[kVector];
      load<kVector>(teacher + channel, t);
      load<kVector>(student + channel, s);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum.add(to_double(t[i]), to_double(s[i]));
    }
  }
#pragma unroll
  for (int lane_bit = kLineLanes / 2; lane_bit > 0; lane_bit /= 2) sum.add_lane(lane_bit);
  if (inside && lane == 0) distances[position] = static_cast<Real>(sum.distance());
}

template <class T, class Real>
__device__ void distances_of_tile(const Launch& launch, int64_t image, int64_t tile, Shared<Real>& shared) {
  constexpr int kVector = sizeof(uint4) / sizeof(T);
  int index = launch.params.num_levels - 1;  // the coarse levels first: theirs are the largest tiles
  for (; tile >= launch.tiles[index]; --index) tile -= launch.tiles[index];
  const Level& level = launch.params.levels[index];
  Real* const distances =
      static_cast<Real*>(launch.distances) + launch.distance_offset[index] + image * level.height * level.width;
  switch (launch.layout[index]) {
    case Layout::kPlanes:
      return distances_of_planes<kVector, T>(level, image, tile * kPlaneTile<kVector>, distances, shared);
    case Layout::kChannelsLast:
      return distances_of_channels_last<kVector, T>(level, image, tile * kChannelsLastTile, distances);
    case Layout::kStrided:
      return distances_of_planes<1, T>(level, image, tile * kPlaneTile<1>, distances, shared);
  }
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
__device__ auto map_of_column(const Launch& launch, int64_t image, int64_t first_row, int64_t column,
                              const Shared<Real>& shared) {
  const AnomalyMapParams& params = launch.params;
  const int64_t pixels = params.height * params.width;
  Real combined[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) combined[i] = Combine::identity;
  for (int index = 0; index < params.num_levels; ++index) {
    const Level& level = params.levels[index];
    const Real* const distances =
        static_cast<const Real*>(launch.distances) + launch.distance_offset[index] + image * level.height * level.width;
    const auto x = interpolation<Real>(column, level.width, launch.column_scale[index]);
    const auto stretched = [&](int64_t row) {
      const Real* const samples = distances + row * level.width;
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

/// A unit of pixels, kRows rows of kThreads columns of one image, and its part in the image's score.
template <class Combine, class Real>
__device__ void map_of_unit(const Launch& launch, int64_t image, int64_t unit, Shared<Real>& shared) {
  using Bits = decltype(ordered_bits(Real(0)));
  const AnomalyMapParams& params = launch.params;
  const int64_t first_row = unit / launch.column_units * kRows;
  const int64_t column = unit % launch.column_units * kThreads + threadIdx.x;
  __syncthreads();
  for (int i = threadIdx.x; i < params.num_levels * kRows; i += kThreads) {
    const int index = i / kRows, row = i % kRows;
    shared.rows[index][row] =
        interpolation<Real>(first_row + row, params.levels[index].height, launch.row_scale[index]);
  }
  __syncthreads();
  Bits maximum = column < params.width ? map_of_column<Combine>(launch, image, first_row, column, shared) : 0;
#pragma unroll
  for (int lane_bit = kWarp / 2; lane_bit > 0; lane_bit /= 2) {
    const Bits other = __shfl_xor_sync(0xffffffffu, maximum, lane_bit);
    maximum = other > maximum ? other : maximum;
  }
  if (threadIdx.x % kWarp == 0) atomicMax(static_cast<Bits*>(params.score) + image, maximum);
}

template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T, class Combine>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    anomaly_map_kernel(const __grid_constant__ Launch launch) {
  STFPM_EXT_SHARED(Shared<RealOf<T>>, shared);
  const Team team = team_of(launch);
  if (team.rank == 0)
    for (int64_t i = threadIdx.x; i < team.images; i += kThreads)
      static_cast<RealOf<T>*>(launch.params.score)[team.first_image + i] = 0;
  for (int64_t i = team.rank; i < team.images * launch.tiles_per_image; i += team.size)
    distances_of_tile<T>(launch, team.first_image + i / launch.tiles_per_image, i % launch.tiles_per_image, shared);
  team_barrier(launch);
  for (int64_t i = team.rank; i < team.images * launch.units_per_image; i += team.size)
    map_of_unit<Combine>(launch, team.first_image + i / launch.units_per_image, i % launch.units_per_image, shared);
}

// ---- host

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error("CUDA: " + what + ": " + cudaGetErrorString(error));
}

int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "device " + std::to_string(device));
  return value;
}

/// Makes a device the current one, and the one before it again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_), "the current device");
    if (previous_ != device_) check(cudaSetDevice(device_), "device " + std::to_string(device_));
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, previous_ = 0;
};

template <class T>
Layout layout_of(const Level& level, int64_t batch) {
  constexpr int64_t kVector = sizeof(uint4) / sizeof(T);
  const auto loads_are_aligned = [&](const Features& features, bool planes) {
    const auto fits = [](int64_t count, int64_t stride) { return count == 1 || stride % kVector == 0; };
    return reinterpret_cast<uintptr_t>(features.data) % sizeof(uint4) == 0 && fits(batch, features.batch_stride) &&
           (planes ? fits(level.channels, features.channel_stride)
                   : fits(level.height, features.row_stride) && fits(level.width, features.column_stride));
  };
  const auto planes = [&](const Features& features) {
    return (level.width == 1 || features.column_stride == 1) &&
           (level.height == 1 || features.row_stride == level.width) && level.height * level.width % kVector == 0 &&
           loads_are_aligned(features, true);
  };
  const auto channels_last = [&](const Features& features) {
    return features.channel_stride == 1 && level.channels % kVector == 0 && loads_are_aligned(features, false);
  };
  if (planes(level.teacher) && planes(level.student)) return Layout::kPlanes;
  if (channels_last(level.teacher) && channels_last(level.student)) return Layout::kChannelsLast;
  return Layout::kStrided;
}

template <class T>
int64_t tile_size(Layout layout) {
  if (layout == Layout::kPlanes) return kPlaneTile<sizeof(uint4) / sizeof(T)>;
  return layout == Layout::kChannelsLast ? kChannelsLastTile : kPlaneTile<1>;
}

template <class T>
Launch prepare(const AnomalyMapParams& params, void* distances) {
  Launch launch{};
  launch.params = params;
  launch.distances = distances;
  int64_t offset = 0;
  for (int index = 0; index < params.num_levels; ++index) {
    const Level& level = params.levels[index];
    launch.distance_offset[index] = offset;
    offset += params.batch * level.height * level.width;
    launch.layout[index] = layout_of<T>(level, params.batch);
    launch.tiles[index] = ceil_div(level.height * level.width, tile_size<T>(launch.layout[index]));
    launch.tiles_per_image += launch.tiles[index];
    launch.row_scale[index] = interpolation_scale(level.height, params.height);
    launch.column_scale[index] = interpolation_scale(level.width, params.width);
  }
  launch.column_units = ceil_div(params.width, kThreads);
  launch.units_per_image = ceil_div(params.height, kRows) * launch.column_units;
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

template <class T>
void enqueue(const AnomalyMapParams& params, void* distances, int device, cudaStream_t stream) {
  Launch launch = prepare<T>(params, distances);
  const auto kernel = kernel_for<T>(params);
  const int64_t processors = attribute_of(device, cudaDevAttrMultiProcessorCount);

  cudaFuncAttributes code{};
  const cudaError_t found = cudaFuncGetAttributes(&code, kernel);
  if (found == cudaErrorNoKernelImageForDevice || found == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();  // not for the next call to find
    throw std::runtime_error("device " + std::to_string(device) + " has compute capability " +
                             std::to_string(attribute_of(device, cudaDevAttrComputeCapabilityMajor)) + "." +
                             std::to_string(attribute_of(device, cudaDevAttrComputeCapabilityMinor)) +
                             ", and this build holds CUDA code for " STFPM_EXT_CUDA_ARCHITECTURES
                             " only: build it with -C cmake.define.CMAKE_CUDA_ARCHITECTURES=... (see README)");
  }
  check(found, "kernel");

  // As docs/cuda.md reckons: a cluster for each image waits for nobody else, but must be many to fill the device.
  launch.clusters = code.ptxVersion >= 90 && params.batch * kClusterBlocks >= processors;
  int64_t blocks = params.batch * kClusterBlocks;
  if (!launch.clusters)
    blocks = std::min(std::max(params.batch * launch.tiles_per_image, params.batch * launch.units_per_image),
                      kBlocksPerProcessor * processors);  // all of which run at once, by the launch bounds
  if (blocks > INT32_MAX) throw std::invalid_argument("teacher: wanted a batch of at most 268435455 on CUDA");

  cudaLaunchAttribute attribute{};
  if (launch.clusters) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kClusterBlocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, launch), "launch");
}

}  // namespace

void anomaly_map_cuda(const AnomalyMapParams& params, void* distances, int device, void* stream) {
  if (params.batch == 0) return;
  const DeviceGuard guard(device);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case DType::kFloat32:
      return enqueue<float>(params, distances, device, cuda_stream);
    case DType::kFloat64:
      return enqueue<double>(params, distances, device, cuda_stream);
    case DType::kFloat16:
      return enqueue<__half>(params, distances, device, cuda_stream);
    case DType::kBFloat16:
      return enqueue<__nv_bfloat16>(params, distances, device, cuda_stream);
  }
}

}  // namespace stfpm_ext
