// SPDX-License-Identifier: Apache-2.0
//
// Turns the calls of ops/native.py, which are named tuples, into the structs of the backends. ops/arguments.py has
// checked all but overlaps.

#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "../anomaly_map.h"
#include "../feature_matching.h"
#include "../max_pooling.h"

namespace stfpm_ext {

using Size = std::array<int64_t, 2>;  // height and width

/// Shape or strides of [B, C, H, W]: a tuple in Python.
struct Dimensions {
  int64_t batch, channels, height, width;
};

// The fields have their names in calls.cpp, and their meaning in ops/native.py.
using Addresses = std::vector<uintptr_t>;
using AllDimensions = std::vector<Dimensions>;
using Levels = std::tuple<std::string, AllDimensions, Addresses, AllDimensions, Addresses, AllDimensions>;
using ScorerCall = std::tuple<Levels, Size, Size, std::vector<double>, std::string, uintptr_t, uintptr_t, uintptr_t>;
using LossCall = std::tuple<Levels, uintptr_t>;
using PoolingCall = std::tuple<std::string, Dimensions, Size, uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;
using Gradients = std::tuple<Addresses, AllDimensions>;

/// Throws std::invalid_argument where outputs overlap with features or with each other.
AnomalyMapParams params_from(const ScorerCall& call);

FeatureMatchingParams params_from(const LossCall& call);
MaxPoolingParams params_from(const PoolingCall& call);
std::array<MutableFeatures, kMaxLevels> gradients_from(const Gradients& gradients, int num_levels);

}  // namespace stfpm_ext

/// pybind11's own caster for arrays accepts any sequence, and makes a whole call take twice as long.
template <>
struct pybind11::detail::type_caster<stfpm_ext::Dimensions> {
  PYBIND11_TYPE_CASTER(stfpm_ext::Dimensions, const_name("tuple[int, int, int, int]"));

  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    int64_t* const targets[] = {&value.batch, &value.channels, &value.height, &value.width};
    for (Py_ssize_t i = 0; i < 4; ++i) *targets[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), i));
    const bool read = PyErr_Occurred() == nullptr;
    if (!read) PyErr_Clear();
    return read;
  }
};
