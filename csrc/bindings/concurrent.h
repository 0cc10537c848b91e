// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace stfpm_ext {

/// Calls functions on so many threads, and returns what they return; of what they raise, the first.
pybind11::list run_all(const std::vector<pybind11::function>& functions, int num_threads);

}  // namespace stfpm_ext
