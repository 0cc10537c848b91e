// SPDX-License-Identifier: Apache-2.0
//
// The barriers of cooperative_groups; see cuda_runtime.h beside this file. One in a launch that has none is a crash.

#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct Group {
  cuda_on_threads::Barrier* barrier;
  void sync() const { barrier->wait(); }
};

inline Group this_grid() { return {cuda_on_threads::place.grid}; }
inline Group this_cluster() { return {cuda_on_threads::place.cluster}; }

}  // namespace cooperative_groups
