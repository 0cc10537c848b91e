// SPDX-License-Identifier: Apache-2.0
//
// csrc/cuda as a library for test_cuda_on_threads.py to call.

#include <cstdio>
#include <exception>

#include "../../csrc/cuda/anomaly_map_cuda.cu"

/// Runs the scorer on a device that is made up; returns 0, or 1 and the error's text.
extern "C" int anomaly_map_on_threads(const stfpm_ext::AnomalyMapParams* params, void* distances, int device,
                                      int processors, int ptx_version, int has_image, char* error, size_t error_size) {
  cuda_on_threads::device = {processors, ptx_version, has_image != 0, 0};
  try {
    stfpm_ext::anomaly_map_cuda(*params, distances, device, nullptr);
  } catch (const std::exception& exception) {
    std::snprintf(error, error_size, "%s", exception.what());
    return 1;
  }
  return cuda_on_threads::device.current == 0 ? 0 : 1;
}
