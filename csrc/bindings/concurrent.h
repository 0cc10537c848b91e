// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <pybind11/pybind11.h>

namespace stfpm_ext {

/// Calls two functions at the same time, and returns what they return; of what they raise, the first.
pybind11::tuple run_both(const pybind11::function& first, const pybind11::function& second);

}  // namespace stfpm_ext
