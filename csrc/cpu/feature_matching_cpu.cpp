// SPDX-License-Identifier: Apache-2.0
//
// The loss on the CPU. Its value is added up in an order that does not depend on the number of threads: each task's
// positions, and then the tasks, whose size is fixed.

#include <vector>

#include "../feature_matching.h"
#include "dispatch.h"
#include "tasks.h"
#include "team.h"

namespace stfpm_ext {
namespace {

constexpr int64_t kPositionsPerTask = 1024;

/// Where the scalars of each level are.
template <class Real>
struct Scalars {
  Real* factors[kMaxLevels];
  Real* projections[kMaxLevels];
  Real* values[kMaxLevels];

  explicit Scalars(const FeatureMatchingParams& params) {
    int64_t offset = 0;
    for (int index = 0; index < params.num_levels; ++index) {
      factors[index] = static_cast<Real*>(params.scalars) + offset;
      offset += params.batch * params.levels[index].height * params.levels[index].width;
    }
    for (int index = 0; index < params.num_levels; ++index) {
      projections[index] = factors[index] + offset;
      values[index] = projections[index] + offset;
    }
  }
};

int64_t positions_of(const Level& level) { return level.height * level.width; }

/// The weight of each position in the mean over batch and positions of its level.
double share(const FeatureMatchingParams& params, int level) {
  return 1.0 / static_cast<double>(params.batch * positions_of(params.levels[level]));
}

template <class Work>
void run_tasks(const FeatureMatchingParams& params, const std::vector<PositionTask>& tasks, int64_t bytes,
               int num_threads, const Work& work) {
  TaskQueue queue(static_cast<int64_t>(tasks.size()));
  run_team(threads_for(bytes, num_threads), [&] {
    queue.work([&](int64_t index) {
      const PositionTask& task = tasks[static_cast<size_t>(index)];
      work(index, task, params.levels[task.level], task.image * positions_of(params.levels[task.level]));
    });
  });
}

template <class Real>
void forward(const FeatureMatchingParams& params, Real* loss, int num_threads) {
  const Kernels& kernel = kernels();
  const Scalars<Real> scalars(params);
  const auto tasks = position_tasks(params.levels, params.num_levels, params.batch, kPositionsPerTask);
  std::vector<double> sums(tasks.size());
  const int64_t bytes = bytes_of_features(params.levels, params.num_levels, params.batch, params.dtype);
  run_tasks(params, tasks, bytes, num_threads,
            [&](int64_t index, const PositionTask& task, const Level& level, int64_t image) {
              sums[static_cast<size_t>(index)] = kernel.matching(
                  params.dtype, level, task.image, task.begin, task.end, scalars.factors[task.level] + image,
                  scalars.projections[task.level] + image, scalars.values[task.level] + image);
            });
  double level_sums[kMaxLevels] = {}, total = 0;
  for (size_t index = 0; index < tasks.size(); ++index) level_sums[tasks[index].level] += sums[index];
  for (int level = 0; level < params.num_levels; ++level) total += level_sums[level] * share(params, level);
  *loss = static_cast<Real>(total);
}

template <class Real>
void backward(const FeatureMatchingParams& params, const Real* upstream, const MutableFeatures* gradients,
              int num_threads) {
  const Kernels& kernel = kernels();
  const Scalars<Real> scalars(params);
  const auto tasks = position_tasks(params.levels, params.num_levels, params.batch, kPositionsPerTask);
  const int64_t bytes = bytes_of_features(params.levels, params.num_levels, params.batch, params.dtype) / 2 * 3;
  run_tasks(params, tasks, bytes, num_threads,
            [&](int64_t, const PositionTask& task, const Level& level, int64_t image) {
              kernel.matching_gradients(params.dtype, level, gradients[task.level], task.image, task.begin, task.end,
                                        scalars.factors[task.level] + image, scalars.projections[task.level] + image,
                                        static_cast<double>(*upstream) * share(params, task.level));
            });
}

}  // namespace

void feature_matching_cpu(const FeatureMatchingParams& params, void* loss, int num_threads) {
  if (params.dtype == DType::kFloat64)
    forward(params, static_cast<double*>(loss), num_threads);
  else
    forward(params, static_cast<float*>(loss), num_threads);
}

void feature_matching_backward_cpu(const FeatureMatchingParams& params, const void* upstream,
                                   const MutableFeatures* gradients, int num_threads) {
  if (params.dtype == DType::kFloat64)
    backward(params, static_cast<const double*>(upstream), gradients, num_threads);
  else
    backward(params, static_cast<const float*>(upstream), gradients, num_threads);
}

}  // namespace stfpm_ext
