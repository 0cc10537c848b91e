// SPDX-License-Identifier: Apache-2.0
//
// csrc/cuda as a library for test_cuda_on_threads.py to call.

#include <cstdio>
#include <exception>

#include "../../../csrc/cuda/anomaly_map_cuda.cu"
#include "../../../csrc/cuda/feature_matching_cuda.cu"

namespace {

/// Runs `work` on a device that is made up; returns 0, or 1 and the error's text.
template <class Work>
int run(const cuda_on_threads::Device& device, char* error, size_t error_size, const Work& work) {
  cuda_on_threads::device = device;
  try {
    work();
  } catch (const std::exception& exception) {
    std::snprintf(error, error_size, "%s", exception.what());
    return 1;
  }
  const auto& after = cuda_on_threads::device;
  return after.current == device.current && after.capture_mode == device.capture_mode ? 0 : 1;
}

}  // namespace

extern "C" int anomaly_map_on_threads(const stfpm_ext::AnomalyMapParams* params, void* scratch, int device,
                                      int processors, int blocks_per_processor, int ptx_version, int has_image,
                                      char* error, size_t error_size) {
  return run({processors, blocks_per_processor, ptx_version, has_image != 0}, error, error_size,
             [&] { stfpm_ext::anomaly_map_cuda(*params, scratch, device, nullptr); });
}

extern "C" int try_on_threads(int device, int ptx_version, int has_image, char* error, size_t error_size) {
  return run({1, 1, ptx_version, has_image != 0}, error, error_size, [&] { stfpm_ext::try_cuda(device); });
}

extern "C" int feature_matching_on_threads(const stfpm_ext::FeatureMatchingParams* params, void* loss,
                                           double* partial_sums, int device, int processors, int blocks_per_processor,
                                           int has_image, char* error, size_t error_size) {
  return run({processors, blocks_per_processor, 80, has_image != 0}, error, error_size,
             [&] { stfpm_ext::feature_matching_cuda(*params, loss, partial_sums, device, nullptr); });
}

extern "C" int feature_matching_backward_on_threads(const stfpm_ext::FeatureMatchingParams* params,
                                                    const void* upstream, const stfpm_ext::MutableFeatures* gradients,
                                                    int device, int processors, int blocks_per_processor, int has_image,
                                                    char* error, size_t error_size) {
  return run({processors, blocks_per_processor, 80, has_image != 0}, error, error_size,
             [&] { stfpm_ext::feature_matching_backward_cuda(*params, upstream, gradients, device, nullptr); });
}
