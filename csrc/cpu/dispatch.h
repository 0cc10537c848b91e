// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace stfpm_ext {

/// Instruction sets that this build holds, the best first.
std::vector<std::string> built_isas();

/// The kernels that this build holds and this machine runs, the best first; never empty.
std::vector<const Kernels*> available_kernels();

/// The kernels in use: the best, or those that the environment variable STFPM_EXT_ISA names.
const Kernels& kernels();

}  // namespace stfpm_ext
