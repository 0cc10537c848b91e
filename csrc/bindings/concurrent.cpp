// SPDX-License-Identifier: Apache-2.0

#include "concurrent.h"

#include <pybind11/stl.h>

#include <atomic>
#include <exception>

#include "../cpu/team.h"
#include "gil.h"

namespace py = pybind11;

namespace stfpm_ext {

py::list run_all(const std::vector<py::function>& functions, int num_threads) {
  std::vector<py::object> results(functions.size());
  std::exception_ptr error;
  std::atomic<size_t> next{0};
  without_gil([&] {
    run_on_torch_threads(num_threads, [&] {
      for (size_t index = next++; index < functions.size(); index = next++) {
        const py::gil_scoped_acquire gil;  // guards the error as well
        try {
          results[index] = functions[index]();
        } catch (...) {
          if (!error) error = std::current_exception();
        }
      }
    });
  });
  if (error) std::rethrow_exception(error);
  return py::cast(results);
}

}  // namespace stfpm_ext
