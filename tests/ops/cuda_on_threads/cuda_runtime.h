// SPDX-License-Identifier: Apache-2.0
//
// CUDA's names with a meaning on host threads, so that the C++ compiler builds csrc/cuda and the sanitizers look into
// it: a thread for each CUDA thread, barriers for __syncthreads, warps, clusters and grids. All blocks that may meet at
// a barrier run at once, the others one after the other.
//
// It shows that indices, barriers and arithmetic are right. It does not show what only the device has: its memory
// model beyond barriers and atomics, warps that run in step, resources, alignment faults, speed.

#pragma once

#include <pthread.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};

namespace cuda_on_threads {

constexpr unsigned kWarp = 32;

/// What the tests pretend to run on.
struct Device {
  int processors = 2;
  int blocks_per_processor = 2;  // that run at once
  int ptx_version = 90;
  bool has_image = true;
  int current = 0;
  cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
};
inline Device device;

class Barrier {
 public:
  explicit Barrier(unsigned count) { pthread_barrier_init(&barrier_, nullptr, count); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  Barrier barrier{kWarp};
  uint64_t exchange[2][kWarp];  // in turn, so that one barrier is enough for each shuffle
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads), warps(threads / kWarp) {}
  Barrier barrier;
  std::vector<Warp> warps;
  std::once_flag shared_once;
  std::unique_ptr<unsigned char[]> shared;
};

/// Where one thread is.
struct Place {
  Block* block = nullptr;
  Barrier* cluster = nullptr;  // null where the launch was not one of clusters
  Barrier* grid = nullptr;     // null where the launch was not cooperative
  unsigned shuffles = 0;
};
inline thread_local Place place;

/// The block's shared memory, full of garbage at first.
template <class Type>
Type& shared() {
  std::call_once(place.block->shared_once, [] {
    place.block->shared.reset(new unsigned char[sizeof(Type)]);
    std::memset(place.block->shared.get(), 0xa5, sizeof(Type));
  });
  return *reinterpret_cast<Type*>(place.block->shared.get());
}

}  // namespace cuda_on_threads

#define STFPM_EXT_SHARED(Type, name) Type& name = cuda_on_threads::shared<Type>()

inline thread_local dim3 threadIdx, blockIdx, gridDim;

inline void __syncthreads() { cuda_on_threads::place.block->barrier.wait(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  using namespace cuda_on_threads;
  Warp& warp = place.block->warps[threadIdx.x / kWarp];
  uint64_t* const exchange = warp.exchange[place.shuffles++ % 2];
  std::memcpy(&exchange[threadIdx.x % kWarp], &value, sizeof value);
  warp.barrier.wait();
  std::memcpy(&value, &exchange[(threadIdx.x % kWarp) ^ static_cast<unsigned>(lane_mask)], sizeof value);
  return value;
}

template <class T>
T atomicMax(T* address, T value) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

template <class T>
T __ldcs(const T* address) {
  return *address;
}

inline int min(int a, int b) { return a < b ? a : b; }

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline long long __double_as_longlong(double value) {
  long long bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidDevice,
  cudaErrorInvalidDeviceFunction,
  cudaErrorNoKernelImageForDevice,
  cudaErrorCooperativeLaunchTooLarge,
  cudaErrorStreamCaptureUnsupported
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int cooperative;
  } val;
};
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  int ptxVersion;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  static const char* const texts[] = {"no error",          "invalid value",
                                      "invalid device",    "invalid device function",
                                      "no kernel image",   "too many blocks in cooperative launch",
                                      "stream is captured"};
  return texts[error];
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, cuda_on_threads::device.capture_mode);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_threads::device.current;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  cuda_on_threads::device.current = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto& device = cuda_on_threads::device;
  *value = attribute == cudaDevAttrMultiProcessorCount      ? device.processors
           : attribute == cudaDevAttrComputeCapabilityMajor ? device.ptx_version / 10
                                                            : device.ptx_version % 10;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  const auto& device = cuda_on_threads::device;
  attributes->ptxVersion = device.ptx_version;
  if (device.capture_mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
  return device.has_image ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}

/// One for each multiprocessor; none, and an error, where no block runs.
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t*) {
  *clusters = cuda_on_threads::device.processors;
  return cuda_on_threads::device.blocks_per_processor == 0 ? cudaErrorInvalidValue : cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  using namespace cuda_on_threads;
  const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  unsigned cluster = 0;
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeCooperative) cooperative = attribute.val.cooperative != 0;
  }
  if (blocks == 0 || threads % kWarp != 0 || (cluster != 0 && blocks % cluster != 0)) return cudaErrorInvalidValue;
  if (cluster != 0 && device.ptx_version < 90) return cudaErrorInvalidValue;
  if (cooperative && blocks > static_cast<unsigned>(device.processors * device.blocks_per_processor))
    return cudaErrorCooperativeLaunchTooLarge;
  const unsigned at_once = cooperative ? blocks : cluster != 0 ? cluster : 1;
  for (unsigned first = 0; first < blocks; first += at_once) {
    Barrier all(at_once * threads);
    std::vector<std::unique_ptr<Block>> running;
    std::vector<std::thread> team;
    for (unsigned b = 0; b < at_once; ++b) {
      running.push_back(std::make_unique<Block>(threads));
      Block* const block = running.back().get();
      for (unsigned t = 0; t < threads; ++t)
        team.emplace_back([=, &all, &arguments...] {
          place = Place{block, cluster != 0 ? &all : nullptr, cooperative ? &all : nullptr, 0};
          threadIdx = dim3(t);
          blockIdx = dim3(first + b);
          gridDim = config->gridDim;
          kernel(arguments...);
        });
    }
    for (std::thread& thread : team) thread.join();
  }
  return cudaSuccess;
}
