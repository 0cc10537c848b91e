// SPDX-License-Identifier: Apache-2.0
//
// The scorer on the CPU: distance maps of all levels first, then the pixels, both shared out over threads in pieces
// whose borders do not depend on the number of threads or images.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "../anomaly_map.h"
#include "../anomaly_map_math.h"
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

template <class Real>
void anomaly_map_of(const AnomalyMapParams& params, int num_threads) {
  const Kernels& kernel = kernels();

  std::vector<ColumnTable<Real>> tables;
  tables.reserve(static_cast<size_t>(params.num_levels));
  std::vector<Columns> columns;
  std::vector<int64_t> level_offset(1, 0);  // of each level's distance maps, [B, H, W], one after the other
  const int64_t pixels = params.height * params.width;
  for (int index = 0; index < params.num_levels; ++index) {
    const Level& level = params.levels[index];
    const int64_t positions = level.height * level.width;
    tables.emplace_back(level.width, params.width);
    columns.push_back(tables.back().columns());
    level_offset.push_back(level_offset.back() + params.batch * positions);
  }
  const int64_t bytes = bytes_of_features(params.levels, params.num_levels, params.batch, params.dtype) +
                        params.batch * pixels * pixel_bytes(params.dtype);
  num_threads = threads_for(bytes, num_threads);
  const std::vector<PositionTask> distance_tasks =
      position_tasks(params.levels, params.num_levels, params.batch, positions_per_task(params, num_threads));
  const std::unique_ptr<Real[]> distances(new Real[static_cast<size_t>(level_offset.back() + kRowPadding)]);
  const auto distance_map = [&](int level, int64_t image) {
    return distances.get() + level_offset[static_cast<size_t>(level)] +
           image * params.levels[level].height * params.levels[level].width;
  };

  const int64_t blocks = ceil_div(params.height, kRowsPerTask);  // of rows, in each image
  std::vector<double> block_maximum(static_cast<size_t>(params.batch * blocks));

  // All memory is taken here: a thread of the team has no way to report that there is none.
  const int64_t scratch_size = 2 * params.num_levels * params.width;
  const std::unique_ptr<Real[]> all_scratch(new Real[static_cast<size_t>(num_threads * scratch_size)]);
  std::atomic<int> next_member{0};

  TaskQueue distance_queue(static_cast<int64_t>(distance_tasks.size()));
  TaskQueue row_queue(params.batch * blocks);
  run_team(num_threads, [&] {
    Real* const scratch = all_scratch.get() + next_member.fetch_add(1) * scratch_size;
    distance_queue.work([&](int64_t index) {
      const PositionTask& task = distance_tasks[static_cast<size_t>(index)];
      kernel.distances(params.dtype, params.levels[task.level], task.image, task.begin, task.end,
                       distance_map(task.level, task.image));
    });
    distance_queue.wait();
    row_queue.work([&](int64_t index) {
      const int64_t image = index / blocks, begin = index % blocks * kRowsPerTask;
      const void* image_distances[kMaxLevels] = {};
      for (int level = 0; level < params.num_levels; ++level) image_distances[level] = distance_map(level, image);
      block_maximum[static_cast<size_t>(index)] = kernel.rows(params, image_distances, columns.data(), image, begin,
                                                              std::min(begin + kRowsPerTask, params.height), scratch);
    });
  });

  for (int64_t image = 0; image < params.batch; ++image) {
    double score = block_maximum[static_cast<size_t>(image * blocks)];
    for (int64_t block = 1; block < blocks; ++block) {
      const double maximum = block_maximum[static_cast<size_t>(image * blocks + block)];
      if (maximum > score || std::isnan(maximum)) score = maximum;
      if (std::isnan(score)) break;
    }
    static_cast<Real*>(params.score)[image] = static_cast<Real>(score);
  }
}

}  // namespace

void anomaly_map_cpu(const AnomalyMapParams& params, int num_threads) {
  if (params.dtype == DType::kFloat64)
    anomaly_map_of<double>(params, num_threads);
  else
    anomaly_map_of<float>(params, num_threads);
}

}  // namespace stfpm_ext
