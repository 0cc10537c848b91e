// SPDX-License-Identifier: Apache-2.0
//
// The Python module _core: integers in, structs out, the GIL released. Its callers have checked
// all but overlaps; _core.pyi says what they mean.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <exception>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "anomaly_map.h"
#include "cpu/dispatch.h"
#include "cpu/team.h"
#include "feature_matching.h"

namespace py = pybind11;
using namespace stfpm_ext;

namespace {

// teacher and student address, channels, height, width, then four strides of the teacher and four of the student
using LevelTuple = std::array<int64_t, 13>;

DType dtype_from(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  throw std::invalid_argument("dtype '" + name + "' is not supported");
}

Combination combination_from(const std::string& name) {
  if (name == "product") return Combination::kProduct;
  if (name == "sum") return Combination::kSum;
  if (name == "maximum") return Combination::kMaximum;
  throw std::invalid_argument("combination '" + name + "' is not supported");
}

/// Fills in all but the weights, and returns the number of levels.
int read_levels(const std::vector<LevelTuple>& tuples, Level* levels) {
  if (tuples.empty() || tuples.size() > kMaxLevels) throw std::invalid_argument("1 to 8 levels are supported");
  for (size_t i = 0; i < tuples.size(); ++i) {
    const LevelTuple& v = tuples[i];
    levels[i] = {{reinterpret_cast<const void*>(v[0]), v[5], v[6], v[7], v[8]},
                 {reinterpret_cast<const void*>(v[1]), v[9], v[10], v[11], v[12]},
                 v[2],
                 v[3],
                 v[4],
                 1.0};
  }
  return static_cast<int>(tuples.size());
}

/// The bytes from `begin` up to, not including, `end`.
struct Extent {
  uintptr_t begin, end;

  static Extent of(const Features& features, const Level& level, int64_t batch, int64_t element) {
    const int64_t reach[] = {(batch - 1) * features.batch_stride, (level.channels - 1) * features.channel_stride,
                             (level.height - 1) * features.row_stride, (level.width - 1) * features.column_stride};
    Extent extent{reinterpret_cast<uintptr_t>(features.data), reinterpret_cast<uintptr_t>(features.data)};
    for (const int64_t distance : reach)
      (distance < 0 ? extent.begin : extent.end) += static_cast<uintptr_t>(distance * element);
    extent.end += static_cast<uintptr_t>(element);
    return extent;
  }
  static Extent of(const void* output, int64_t bytes) {
    return {reinterpret_cast<uintptr_t>(output), reinterpret_cast<uintptr_t>(output) + static_cast<uintptr_t>(bytes)};
  }
  bool overlaps(const Extent& other) const { return begin < other.end && other.begin < end; }
};

/// Throws if one of the outputs lies where another or a feature does.
void check_overlap(const AnomalyMapParams& params) {
  if (params.batch == 0) return;
  std::vector<Extent> taken;
  for (int index = 0; index < params.num_levels; ++index)
    for (const Features* features : {&params.levels[index].teacher, &params.levels[index].student})
      taken.push_back(Extent::of(*features, params.levels[index], params.batch, feature_bytes(params.dtype)));
  const int64_t pixel = pixel_bytes(params.dtype), combined = params.combine_height * params.combine_width;
  const Extent outputs[] = {Extent::of(params.map, params.batch * params.height * params.width * pixel),
                            Extent::of(params.score, params.batch * pixel),
                            Extent::of(params.level_maps, params.batch * params.num_levels * combined * pixel)};
  for (size_t index = 0; index < (params.level_maps == nullptr ? 2 : 3); ++index) {
    for (const Extent& other : taken)
      if (outputs[index].overlaps(other))
        throw std::invalid_argument("out[" + std::to_string(index) +
                                    "]: wanted memory of its own, got memory that a feature or another output uses");
    taken.push_back(outputs[index]);
  }
}

/// Runs `work` without the GIL. Not by py::gil_scoped_release, whose destructor takes the GIL again: while the
/// interpreter ends, that unwinds the thread (Python 3.10 to 3.13), and unwinding out of a destructor aborts the
/// process.
template <class Work>
void without_gil(const Work& work) {
  PyThreadState* const state = PyEval_SaveThread();
  std::exception_ptr error;
  try {
    work();
  } catch (...) {
    error = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (error) std::rethrow_exception(error);
}

// height and width
using SizeTuple = std::array<int64_t, 2>;
// dtype, levels, batch, sizes of the map and where levels are combined, weights, combination, addresses of map, scores
// and level maps
using CallTuple = std::tuple<std::string, std::vector<LevelTuple>, int64_t, SizeTuple, SizeTuple, std::vector<double>,
                             std::string, uintptr_t, uintptr_t, uintptr_t>;

AnomalyMapParams params_from(const CallTuple& call) {
  const auto& [dtype, levels, batch, size, combine_size, weights, combine, map, score, level_maps] = call;
  AnomalyMapParams params{};
  params.dtype = dtype_from(dtype);
  params.combination = combination_from(combine);
  if (weights.size() != levels.size()) throw std::invalid_argument("a weight for each level is needed");
  params.num_levels = read_levels(levels, params.levels);
  for (size_t i = 0; i < levels.size(); ++i) params.levels[i].weight = weights[i];
  params.batch = batch;
  params.height = size[0];
  params.width = size[1];
  params.combine_height = combine_size[0];
  params.combine_width = combine_size[1];
  params.map = reinterpret_cast<void*>(map);
  params.score = reinterpret_cast<void*>(score);
  params.level_maps = reinterpret_cast<void*>(level_maps);
  check_overlap(params);
  return params;
}

void score_on_cpu(const CallTuple& call, int num_threads) {
  const AnomalyMapParams params = params_from(call);
  without_gil([&] { anomaly_map_cpu(params, num_threads); });
}

// dtype, levels, batch, address of the scalars
using MatchingTuple = std::tuple<std::string, std::vector<LevelTuple>, int64_t, uintptr_t>;
// address and strides of each level's gradients
using GradientTuples = std::vector<std::array<int64_t, 5>>;

FeatureMatchingParams params_from(const MatchingTuple& call) {
  const auto& [dtype, levels, batch, scalars] = call;
  FeatureMatchingParams params{};
  params.dtype = dtype_from(dtype);
  params.num_levels = read_levels(levels, params.levels);
  params.batch = batch;
  params.scalars = reinterpret_cast<void*>(scalars);
  return params;
}

std::array<MutableFeatures, kMaxLevels> gradients_from(const GradientTuples& tuples, int num_levels) {
  if (tuples.size() != static_cast<size_t>(num_levels))
    throw std::invalid_argument("gradients of each level are needed");
  std::array<MutableFeatures, kMaxLevels> gradients{};
  for (size_t i = 0; i < tuples.size(); ++i)
    gradients[i] = {reinterpret_cast<void*>(tuples[i][0]), tuples[i][1], tuples[i][2], tuples[i][3], tuples[i][4]};
  return gradients;
}

void match_on_cpu(const MatchingTuple& call, uintptr_t loss, int num_threads) {
  const FeatureMatchingParams params = params_from(call);
  without_gil([&] { feature_matching_cpu(params, reinterpret_cast<void*>(loss), num_threads); });
}

void match_backward_on_cpu(const MatchingTuple& call, uintptr_t upstream, const GradientTuples& tuples,
                           int num_threads) {
  const FeatureMatchingParams params = params_from(call);
  const auto gradients = gradients_from(tuples, params.num_levels);
  without_gil([&] {
    feature_matching_backward_cpu(params, reinterpret_cast<const void*>(upstream), gradients.data(), num_threads);
  });
}

/// Calls two functions at the same time, and returns what they return; of what they raise, the first.
py::tuple run_both(const py::function& first, const py::function& second) {
  const std::array<const py::function*, 2> functions{&first, &second};
  std::array<py::object, 2> results;
  std::exception_ptr error;
  std::atomic<size_t> next{0};
  without_gil([&] {
    run_team(2, [&] {
      for (size_t index = next++; index < functions.size(); index = next++) {
        const py::gil_scoped_acquire gil;  // guards the error as well
        try {
          results[index] = (*functions[index])();
        } catch (...) {
          if (!error) error = std::current_exception();
        }
      }
    });
  });
  if (error) std::rethrow_exception(error);
  return py::make_tuple(results[0], results[1]);
}

#ifdef STFPM_EXT_CUDA_ARCHITECTURES
constexpr const char* kCudaArchitectures = STFPM_EXT_CUDA_ARCHITECTURES;

void score_on_cuda(const CallTuple& call, uintptr_t scratch, int device, uintptr_t stream) {
  const AnomalyMapParams params = params_from(call);
  without_gil(
      [&] { anomaly_map_cuda(params, reinterpret_cast<void*>(scratch), device, reinterpret_cast<void*>(stream)); });
}

void match_on_cuda(const MatchingTuple& call, uintptr_t loss, uintptr_t partial_sums, int device, uintptr_t stream) {
  const FeatureMatchingParams params = params_from(call);
  without_gil([&] {
    feature_matching_cuda(params, reinterpret_cast<void*>(loss), reinterpret_cast<double*>(partial_sums), device,
                          reinterpret_cast<void*>(stream));
  });
}

void match_backward_on_cuda(const MatchingTuple& call, uintptr_t upstream, const GradientTuples& tuples, int device,
                            uintptr_t stream) {
  const FeatureMatchingParams params = params_from(call);
  const auto gradients = gradients_from(tuples, params.num_levels);
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
  module.def("run_both", &run_both, py::arg("first"), py::arg("second"));
  module.attr("most_partial_sums") = kMostPartialSums;
#ifdef STFPM_EXT_CUDA_ARCHITECTURES
  module.def("anomaly_map_cuda", &score_on_cuda, py::arg("call"), py::arg("scratch"), py::arg("device"),
             py::arg("stream"));
  module.def("feature_matching_cuda", &match_on_cuda, py::arg("call"), py::arg("loss"), py::arg("partial_sums"),
             py::arg("device"), py::arg("stream"));
  module.def("feature_matching_backward_cuda", &match_backward_on_cuda, py::arg("call"), py::arg("upstream"),
             py::arg("gradients"), py::arg("device"), py::arg("stream"));
#endif
}
