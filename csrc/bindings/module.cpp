// SPDX-License-Identifier: Apache-2.0
//
// The Python module _core. Its one caller is ops/native.py.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/team.h"
#include "calls.h"
#include "concurrent.h"
#include "fingerprint.h"
#include "gil.h"

namespace py = pybind11;
using namespace stfpm_ext;

namespace {

void score_on_cpu(const ScorerCall& call, int num_threads) {
  const AnomalyMapParams params = params_from(call);
  without_gil([&] { anomaly_map_cpu(params, num_threads); });
}

void match_on_cpu(const LossCall& call, uintptr_t loss, int num_threads) {
  const FeatureMatchingParams params = params_from(call);
  without_gil([&] { feature_matching_cpu(params, reinterpret_cast<void*>(loss), num_threads); });
}

void match_backward_on_cpu(const LossCall& call, uintptr_t upstream, const Gradients& targets, int num_threads) {
  const FeatureMatchingParams params = params_from(call);
  const auto gradients = gradients_from(targets, params.num_levels);
  without_gil([&] {
    feature_matching_backward_cpu(params, reinterpret_cast<const void*>(upstream), gradients.data(), num_threads);
  });
}

void pool_on_cpu(const PoolingCall& call, int num_threads) {
  const MaxPoolingParams params = params_from(call);
  without_gil([&] { max_pooling_cpu(params, num_threads); });
}

/// Takes the blocks in an array of unsigned 64-bit numbers, since to make a list of them takes longer than the rest.
uint64_t fingerprint_of(const py::buffer& blocks) {
  const py::buffer_info info = blocks.request();
  return fingerprint(static_cast<const Block*>(info.ptr), static_cast<size_t>(info.size) / std::tuple_size_v<Block>);
}

#ifdef STFPM_EXT_CUDA_ARCHITECTURES
constexpr const char* kCudaArchitectures = STFPM_EXT_CUDA_ARCHITECTURES;

void score_on_cuda(const ScorerCall& call, uintptr_t scratch, int device, uintptr_t stream) {
  const AnomalyMapParams params = params_from(call);
  without_gil(
      [&] { anomaly_map_cuda(params, reinterpret_cast<void*>(scratch), device, reinterpret_cast<void*>(stream)); });
}

void try_on_cuda(int device) {
  without_gil([&] { try_cuda(device); });
}

void match_on_cuda(const LossCall& call, uintptr_t loss, uintptr_t partial_sums, int device, uintptr_t stream) {
  const FeatureMatchingParams params = params_from(call);
  without_gil([&] {
    feature_matching_cuda(params, reinterpret_cast<void*>(loss), reinterpret_cast<double*>(partial_sums), device,
                          reinterpret_cast<void*>(stream));
  });
}

void match_backward_on_cuda(const LossCall& call, uintptr_t upstream, const Gradients& targets, int device,
                            uintptr_t stream) {
  const FeatureMatchingParams params = params_from(call);
  const auto gradients = gradients_from(targets, params.num_levels);
  without_gil([&] {
    feature_matching_backward_cuda(params, reinterpret_cast<const void*>(upstream), gradients.data(), device,
                                   reinterpret_cast<void*>(stream));
  });
}
#else
constexpr const char* kCudaArchitectures = "";
#endif

std::vector<std::string> names_of(const std::vector<const Kernels*>& all) {
  std::vector<std::string> names;
  for (const Kernels* kernel : all) names.emplace_back(kernel->isa);
  return names;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.attr("__version__") = STFPM_EXT_VERSION;
  module.attr("compiler") = STFPM_EXT_COMPILER;
  module.attr("built_isas") = built_isas();
  module.attr("available_isas") = names_of(available_kernels());
  module.attr("cuda_architectures") = kCudaArchitectures;
  module.def("selected_isa", [] { return std::string(kernels().isa); });
  module.def("anomaly_map", &score_on_cpu, py::arg("call"), py::arg("num_threads"));
  module.def("feature_matching", &match_on_cpu, py::arg("call"), py::arg("loss"), py::arg("num_threads"));
  module.def("feature_matching_backward", &match_backward_on_cpu, py::arg("call"), py::arg("upstream"),
             py::arg("gradients"), py::arg("num_threads"));
  module.def("max_pooling", &pool_on_cpu, py::arg("call"), py::arg("num_threads"));
  module.def("fingerprint", &fingerprint_of, py::arg("blocks"));
  module.def("threads_are_late", &threads_are_late);
  module.def("run_all", &run_all, py::arg("functions"), py::arg("num_threads"));
  module.attr("most_partial_sums") = kMostPartialSums;
#ifdef STFPM_EXT_CUDA_ARCHITECTURES
  module.def("anomaly_map_cuda", &score_on_cuda, py::arg("call"), py::arg("scratch"), py::arg("device"),
             py::arg("stream"));
  module.def("try_cuda", &try_on_cuda, py::arg("device"));
  module.def("feature_matching_cuda", &match_on_cuda, py::arg("call"), py::arg("loss"), py::arg("partial_sums"),
             py::arg("device"), py::arg("stream"));
  module.def("feature_matching_backward_cuda", &match_backward_on_cuda, py::arg("call"), py::arg("upstream"),
             py::arg("gradients"), py::arg("device"), py::arg("stream"));
#endif
}
