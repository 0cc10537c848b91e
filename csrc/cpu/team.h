// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <functional>

namespace stfpm_ext {

/// Runs `body` on at most `num_threads` threads at once, the caller's among them, and returns when all have ended.
/// There may be fewer, so `body` must fetch its share of the work itself.
///
/// The threads are those of torch's OpenMP pool where torch is loaded: a pool beside it would compete with its workers,
/// which spin for a while after each of torch's operators. Without torch, and in a forked child, where libgomp hangs,
/// they are started for this one call.
void run_team(int num_threads, const std::function<void()>& body);

}  // namespace stfpm_ext
