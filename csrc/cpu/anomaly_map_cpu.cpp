// SPDX-License-Identifier: Apache-2.0
//
// The scorer on the CPU: distance maps of all levels first, then the pixels, both shared out over threads in pieces
// whose borders do not depend on the number of threads or images.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <memory>
#include <vector>

#include "../anomaly_map.h"
#include "../distance_math.h"
#include "dispatch.h"
#include "tasks.h"
#include "team.h"

namespace stfpm_ext {
namespace {

constexpr int64_t kRowsPerTask = 32;

/// Source columns of a level for every column of the map.
template <class Real>
struct ColumnTable {
  std::vector<int32_t> low, high;
  std::vector<Real> low_weight, high_weight;

  ColumnTable(int64_t level_width, int64_t width) {
    for (auto* indices : {&low, &high}) indices->reserve(static_cast<size_t>(width));
    for (auto* weights : {&low_weight, &high_weight}) weights->reserve(static_cast<size_t>(width));
    const double scale = interpolation_scale(level_width, width);
    for (int64_t x = 0; x < width; ++x) {
      const auto source = interpolation<Real>(x, level_width, scale);
      low.push_back(static_cast<int32_t>(source.low));
      high.push_back(static_cast<int32_t>(source.high));
      low_weight.push_back(source.low_weight);
      high_weight.push_back(source.high_weight);
    }
  }

  Columns columns() const { return {low.data(), high.data(), low_weight.data(), high_weight.data()}; }
};

/// How many positions make one task: as many as a kernel sums up at a time, or fewer where that would leave threads
/// without work. The distances are the same either way: no position's sum depends on another's.
int64_t positions_per_task(const AnomalyMapParams& params, int num_threads) {
  int64_t size = kTile;
  for (; size > 64; size /= 2) {
    int64_t tasks = 0;
    for (int level = 0; level < params.num_levels; ++level)
      tasks += params.batch * ceil_div(params.levels[level].height * params.levels[level].width, size);
    if (tasks >= 8 * num_threads) break;
  }
  return size;
}

/// One step from maps of the levels to pixels of one map, shared out in blocks of rows.
template <class Real>
class PixelStep {
 public:
  /// `levels`: their maps, [B, height, width] each.
  PixelStep(const AnomalyMapParams& params, const std::vector<const Real*>& levels)
      : params_(params),
        levels_(levels),
        blocks_(ceil_div(params.height, kRowsPerTask)),
        block_maximum_(static_cast<size_t>(params.batch * blocks_)),
        queue_(params.batch * blocks_) {
    tables_.reserve(levels.size());
    for (int index = 0; index < params.num_levels; ++index) {
      tables_.emplace_back(params.levels[index].width, params.width);
      columns_.push_back(tables_.back().columns());
    }
  }

  /// Elements of scratch memory that each thread needs.
  int64_t scratch_size() const { return (2 * params_.num_levels + 1) * params_.width; }

  /// Takes blocks of rows until all are done.
  void work(Real* scratch) {
    queue_.work([&](int64_t index) {
      const int64_t image = index / blocks_, begin = index % blocks_ * kRowsPerTask;
      const void* maps[kMaxLevels] = {};
      for (int level = 0; level < params_.num_levels; ++level)
        maps[level] =
            levels_[static_cast<size_t>(level)] + image * params_.levels[level].height * params_.levels[level].width;
      block_maximum_[static_cast<size_t>(index)] = kernels().rows(
          params_, maps, columns_.data(), image, begin, std::min(begin + kRowsPerTask, params_.height), scratch);
    });
    queue_.wait();
  }

  /// The maximum of one image's map, or NaN if there is one.
  double maximum(int64_t image) const {
    double maximum = block_maximum_[static_cast<size_t>(image * blocks_)];
    for (int64_t block = 1; block < blocks_; ++block) {
      const double other = block_maximum_[static_cast<size_t>(image * blocks_ + block)];
      if (other > maximum || std::isnan(other)) maximum = other;
      if (std::isnan(maximum)) break;
    }
    return maximum;
  }

 private:
  const AnomalyMapParams params_;
  const std::vector<const Real*> levels_;
  const int64_t blocks_;
  std::vector<double> block_maximum_;
  std::vector<ColumnTable<Real>> tables_;
  std::vector<Columns> columns_;
  TaskQueue queue_;
};

template <class Real>
void anomaly_map_of(const AnomalyMapParams& params, int num_threads) {
  std::vector<int64_t> offset(1, 0);  // of each level's distance maps, [B, H, W], one after the other
  for (int index = 0; index < params.num_levels; ++index)
    offset.push_back(offset.back() + params.batch * params.levels[index].height * params.levels[index].width);
  const int64_t combined_size =
      combines_in_map(params) ? 0 : params.batch * params.combine_height * params.combine_width;
  // Padding behind both: a thread that reads past the end of a row must not meet one that writes the combined map.
  const std::unique_ptr<Real[]> distances(
      new Real[static_cast<size_t>(offset.back() + kRowPadding + combined_size + kRowPadding)]);
  Real* const combined = distances.get() + offset.back() + kRowPadding;

  const int64_t bytes = bytes_of_features(params.levels, params.num_levels, params.batch, params.dtype) +
                        params.batch * params.height * params.width * pixel_bytes(params.dtype);
  num_threads = threads_for(bytes, num_threads);
  const std::vector<PositionTask> distance_tasks =
      position_tasks(params.levels, params.num_levels, params.batch, positions_per_task(params, num_threads));
  TaskQueue distance_queue(static_cast<int64_t>(distance_tasks.size()));

  std::vector<const Real*> levels;
  for (int index = 0; index < params.num_levels; ++index)
    levels.push_back(distances.get() + offset[static_cast<size_t>(index)]);
  std::deque<PixelStep<Real>> steps;
  if (combines_in_map(params)) {
    steps.emplace_back(params, levels);
  } else {
    steps.emplace_back(combining_step(params, combined), levels);
    steps.emplace_back(upsampling_step(params), std::vector<const Real*>{combined});
  }

  // All memory is taken here: a thread of the team could not report a lack of it.
  const int64_t scratch_size = std::max(steps.front().scratch_size(), steps.back().scratch_size());
  const std::unique_ptr<Real[]> all_scratch(new Real[static_cast<size_t>(num_threads * scratch_size)]);
  std::atomic<int> next_member{0};
  run_team(num_threads, [&] {
    Real* const scratch = all_scratch.get() + next_member.fetch_add(1) * scratch_size;
    distance_queue.work([&](int64_t index) {
      const PositionTask& task = distance_tasks[static_cast<size_t>(index)];
      const Level& level = params.levels[task.level];
      kernels().distances(
          params.dtype, level, task.image, task.begin, task.end,
          distances.get() + offset[static_cast<size_t>(task.level)] + task.image * level.height * level.width);
    });
    distance_queue.wait();
    for (PixelStep<Real>& step : steps) step.work(scratch);
  });

  for (int64_t image = 0; image < params.batch; ++image)
    static_cast<Real*>(params.score)[image] = static_cast<Real>(steps.back().maximum(image));
}

}  // namespace

void anomaly_map_cpu(const AnomalyMapParams& params, int num_threads) {
  kernels();  // throws for an unknown STFPM_EXT_ISA, which a thread of the team must not
  if (params.dtype == DType::kFloat64)
    anomaly_map_of<double>(params, num_threads);
  else
    anomaly_map_of<float>(params, num_threads);
}

}  // namespace stfpm_ext
