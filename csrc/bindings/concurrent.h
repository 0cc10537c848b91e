// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace stfpm_ext {

/// Calls functions on `num_threads` threads, and returns their results; throws the first error, if any.
pybind11::list run_all(const std::vector<pybind11::function>& functions, int num_threads);

}  // namespace stfpm_ext
