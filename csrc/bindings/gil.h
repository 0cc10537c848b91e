// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <pybind11/pybind11.h>

#include <exception>

namespace stfpm_ext {

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

}  // namespace stfpm_ext
