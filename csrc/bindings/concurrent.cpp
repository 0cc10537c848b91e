// SPDX-License-Identifier: Apache-2.0

#include "concurrent.h"

#include <array>
#include <atomic>
#include <exception>

#include "../cpu/team.h"
#include "gil.h"

namespace py = pybind11;

namespace stfpm_ext {

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

}  // namespace stfpm_ext
