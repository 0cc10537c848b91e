// SPDX-License-Identifier: Apache-2.0

#pragma once

#include "../anomaly_map.h"

namespace stfpm_ext {

/// Throws std::invalid_argument if an output overlaps with a feature or another output.
void check_overlap(const AnomalyMapParams& params);

}  // namespace stfpm_ext
