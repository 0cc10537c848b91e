// SPDX-License-Identifier: Apache-2.0

#pragma once

#include "../anomaly_map.h"

namespace stfpm_ext {

/// Throws std::invalid_argument if one of the outputs lies where another or a feature does.
void check_overlap(const AnomalyMapParams& params);

}  // namespace stfpm_ext
