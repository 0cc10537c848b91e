// SPDX-License-Identifier: Apache-2.0
//
// From the host to the device: errors of CUDA, the device in use, kernels and their launches.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "tiling.cuh"

namespace stfpm_ext {
namespace {

void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error("CUDA: " + what + ": " + cudaGetErrorString(error));
}

int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "device " + std::to_string(device));
  return value;
}

/// Makes a device the current one, and restores the previous one at the end.
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

/// Lets this thread ask about devices and kernels while a stream is captured. To ask may initialise a device or load a
/// kernel. Launches are captured nevertheless.
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

/// Calls `use` with an element of the features' type, while the device is the current one.
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

/// The attributes of a kernel; throws where this build has no code for the device.
template <class Kernel>
cudaFuncAttributes attributes_of(Kernel* kernel, int device) {
  cudaFuncAttributes code{};
  const cudaError_t found = cudaFuncGetAttributes(&code, kernel);
  if (found == cudaErrorNoKernelImageForDevice || found == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();  // so that the next call does not find it
    throw std::runtime_error("device " + std::to_string(device) + " has compute capability " +
                             std::to_string(attribute_of(device, cudaDevAttrComputeCapabilityMajor)) + "." +
                             std::to_string(attribute_of(device, cudaDevAttrComputeCapabilityMinor)) +
                             ", and this build holds CUDA code for " STFPM_EXT_CUDA_ARCHITECTURES
                             " only: build it with -C cmake.define.CMAKE_CUDA_ARCHITECTURES=... (see docs/install.md)");
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

/// Enqueues a kernel. A cooperative one gets fewer blocks where not all can run at once, such as on a shared device.
/// The scorer's result does not depend on their number; the loss may, in its last digit.
template <class Kernel, class Launch>
void launch_kernel(Kernel* kernel, const Launch& launch, cudaLaunchConfig_t config) {
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, launch);
  while (error == cudaErrorCooperativeLaunchTooLarge && config.gridDim.x > 1) {
    cudaGetLastError();  // so that the next call does not find it
    config.gridDim.x /= 2;
    error = cudaLaunchKernelEx(&config, kernel, launch);
  }
  check(error, "launch");
}

}  // namespace
}  // namespace stfpm_ext
