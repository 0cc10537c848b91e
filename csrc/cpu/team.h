// SPDX-License-Identifier: Apache-2.0
//
// Threads for the work of one call. Whoever uses them waits for all of them. Where other programs want the processor,
// that takes milliseconds for one that the system has not run yet. So where they have been late, the caller works alone
// for a while.

#pragma once

#include <functional>

namespace stfpm_ext {

/// Runs `body` on at most `num_threads` threads at once, the caller's among them, and returns when all have ended.
/// There may be fewer, so `body` must fetch its share of the work itself. It must not throw.
///
/// The threads are those of torch's OpenMP pool where torch is loaded: a pool beside it would compete with its workers,
/// which spin for a while after each of torch's operators. Without torch, and in a forked child, where libgomp hangs,
/// they are started for this one call. Within a parallel region of torch's, the caller works alone.
void run_team(int num_threads, const std::function<void()>& body);

/// Whether callers of run_team work alone for now.
bool threads_are_late();

/// Waits within a `body` for the others' part of the work, as `wait` does it.
void wait_in_team(const std::function<void()>& wait);

/// Runs `body`, which calls torch, on torch's threads, late or not: work of many milliseconds is done sooner with late
/// threads than without. Torch's operators use one thread each there. Where torch's threads cannot be used, the caller
/// works alone.
void run_on_torch_threads(int num_threads, const std::function<void()>& body);

}  // namespace stfpm_ext
