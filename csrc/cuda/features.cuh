// SPDX-License-Identifier: Apache-2.0
//
// What the scorer and the loss share on CUDA: how tiles of positions are read, their dot products, and launches.

#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

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
constexpr int kLineLanes = 8;  // lanes that read a line of 128 bytes, 16 bytes each

template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// How a level's features lie in memory, and so which way of reading them is coalesced.
enum class Layout {
  kPlanes,        // positions of a channel are neighbours, and 16-byte loads are aligned
  kChannelsLast,  // channels of a position are neighbours, and 16-byte loads are aligned
  kStrided,       // anything else
};

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

/// Positions of a tile when a lane reads kVector of them at once.
template <int kVector>
constexpr int kPlaneTile = kVector == 1 ? kWarp : kLineLanes * kVector;
/// Lanes that share a position where its channels are neighbours. Of features of 2 bytes they read half a line at a
/// time: of 64 channels, which ResNet18's finest level has, each lane then has two loads in flight instead of one.
template <int kVector>
constexpr int kChannelLanes = kVector == 8 ? kLineLanes / 2 : kLineLanes;
template <int kVector>
constexpr int kChannelsLastTile = kThreads / kChannelLanes<kVector>;
constexpr int kMostPositions = kPlaneTile<8>;

using PartialDotProducts = DotProducts[kWarps][kMostPositions];

/// How the positions of all levels are cut into tiles, and how each level is read.
struct Tiling {
  Layout layout[kMaxLevels];
  int tiles[kMaxLevels];  // of one image at each level
  int tiles_per_image;
  int64_t positions;           // of all levels and images
  int64_t offset[kMaxLevels];  // of each level's positions [B, H, W] in memory that holds those of all
};

struct Tile {
  int level, image, index;
};

/// Tile `index` of those of `images` images. The coarse levels come first: theirs are the largest, and blocks that take
/// turns end together when the last tiles are small.
__device__ Tile tile_of(const Tiling& tiling, int num_levels, int images, int index) {
  int level = num_levels - 1;
  for (; index >= tiling.tiles[level] * images; --level) index -= tiling.tiles[level] * images;
  return {level, index / tiling.tiles[level], index % tiling.tiles[level]};
}

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

// ---- host

constexpr int64_t kMostIndex = 1 << 30;

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

/// Lets this thread ask about devices and kernels while a stream is captured, which may initialise the one and load the
/// other. Launches are captured all the same.
class RelaxedCapture {
 public:
  RelaxedCapture() { exchange(); }
  ~RelaxedCapture() { exchange(); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  void exchange() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// Calls `use` with an element of the features' type, the device being the current one.
template <class Use>
void with_type_on(int device, DType dtype, const Use& use) {
  const RelaxedCapture relaxed;
  const DeviceGuard guard(device);
  switch (dtype) {
    case DType::kFloat32:
      return use(float());
    case DType::kFloat64:
      return use(double());
    case DType::kFloat16:
      return use(__half());
    case DType::kBFloat16:
      return use(__nv_bfloat16());
  }
}

/// `gradients`: those of the level, if they are written the way its features are read.
template <class T, class... Gradients>
Layout layout_of(const Level& level, int64_t batch, const Gradients&... gradients) {
  constexpr int64_t kVector = sizeof(uint4) / sizeof(T);
  const auto loads_are_aligned = [&](const auto& features, bool planes) {
    const auto fits = [](int64_t count, int64_t stride) { return count == 1 || stride % kVector == 0; };
    return reinterpret_cast<uintptr_t>(features.data) % sizeof(uint4) == 0 && fits(batch, features.batch_stride) &&
           (planes ? fits(level.channels, features.channel_stride)
                   : fits(level.height, features.row_stride) && fits(level.width, features.column_stride));
  };
  const auto planes = [&](const auto& features) {
    return (level.width == 1 || features.column_stride == 1) &&
           (level.height == 1 || features.row_stride == level.width) && level.height * level.width % kVector == 0 &&
           loads_are_aligned(features, true);
  };
  const auto channels_last = [&](const auto& features) {
    return features.channel_stride == 1 && level.channels % kVector == 0 && loads_are_aligned(features, false);
  };
  if (planes(level.teacher) && planes(level.student) && (planes(gradients) && ...)) return Layout::kPlanes;
  if (channels_last(level.teacher) && channels_last(level.student) && (channels_last(gradients) && ...))
    return Layout::kChannelsLast;
  return Layout::kStrided;
}

template <class T>
int64_t tile_size(Layout layout) {
  constexpr int kVector = sizeof(uint4) / sizeof(T);
  if (layout == Layout::kPlanes) return kPlaneTile<kVector>;
  return layout == Layout::kChannelsLast ? kChannelsLastTile<kVector> : kPlaneTile<1>;
}

/// Refuses what indices of 32 bits do not reach, with room for a last step beyond the end.
void check_area(const std::string& name, int64_t height, int64_t width) {
  if (height * width > kMostIndex)
    throw std::invalid_argument(name + ": wanted height x width of at most " + std::to_string(kMostIndex) +
                                " on CUDA, got " + std::to_string(height) + " x " + std::to_string(width));
}
void check_batch(int64_t batch, int64_t work_per_image) {
  if (batch > kMostIndex / work_per_image)
    throw std::invalid_argument("teacher: wanted a batch of at most " + std::to_string(kMostIndex / work_per_image) +
                                " on CUDA, got " + std::to_string(batch));
}

/// Cuts a level into tiles; levels come in order.
template <class T>
void add_level(Tiling& tiling, int index, const Level& level, int64_t batch, Layout layout) {
  check_area("teacher[" + std::to_string(index) + "]", level.height, level.width);
  tiling.layout[index] = layout;
  tiling.tiles[index] = static_cast<int>(ceil_div(level.height * level.width, tile_size<T>(layout)));
  tiling.tiles_per_image += tiling.tiles[index];
  tiling.offset[index] = tiling.positions;
  tiling.positions += batch * level.height * level.width;
}

/// What is known of a kernel, or an error where this build has no code for the device.
template <class Kernel>
cudaFuncAttributes attributes_of(Kernel* kernel, int device) {
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
  return code;
}

cudaLaunchAttribute cooperative() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  return attribute;
}

/// `attribute` may be null.
cudaLaunchConfig_t launch_config(int64_t blocks, cudaStream_t stream, cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = attribute != nullptr ? 1 : 0;
  return config;
}

/// Enqueues a kernel. A cooperative one gets fewer blocks where not all can run at once, as may be where a device is
/// shared; the scorer's result does not depend on their number, the loss may in its last digit.
template <class Kernel, class Launch>
void launch_kernel(Kernel* kernel, const Launch& launch, cudaLaunchConfig_t config) {
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, launch);
  while (error == cudaErrorCooperativeLaunchTooLarge && config.gridDim.x > 1) {
    cudaGetLastError();  // not for the next call to find
    config.gridDim.x /= 2;
    error = cudaLaunchKernelEx(&config, kernel, launch);
  }
  check(error, "launch");
}

}  // namespace
}  // namespace stfpm_ext
