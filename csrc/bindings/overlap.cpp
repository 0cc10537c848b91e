// SPDX-License-Identifier: Apache-2.0

#include "overlap.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace stfpm_ext {
namespace {

/// The bytes from `begin` up to, not including, `end`.
struct Extent {
  uintptr_t begin, end;

  static Extent of(const Features& features, const Level& level, int64_t batch, int64_t element) {
    const int64_t reach[] = {(batch - 1) * features.batch_stride, (level.channels - 1) * features.channel_stride,
                             (level.height - 1) * features.row_stride, (level.width - 1) * features.column_stride};
    Extent extent{reinterpret_cast<uintptr_t>(features.data), reinterpret_cast<uintptr_t>(features.data)};
    for (const int64_t distance : reach)
      (distance < 0 ? extent.begin : extent.end) += static_cast<uintptr_t>(distance * element);
    extent.end += static_cast<uintptr_t>(element);
    return extent;
  }
  static Extent of(const void* output, int64_t bytes) {
    return {reinterpret_cast<uintptr_t>(output), reinterpret_cast<uintptr_t>(output) + static_cast<uintptr_t>(bytes)};
  }
  bool overlaps(const Extent& other) const { return begin < other.end && other.begin < end; }
};

}  // namespace

void check_overlap(const AnomalyMapParams& params) {
  if (params.batch == 0) return;
  std::vector<Extent> taken;
  for (int index = 0; index < params.num_levels; ++index)
    for (const Features* features : {&params.levels[index].teacher, &params.levels[index].student})
      taken.push_back(Extent::of(*features, params.levels[index], params.batch, feature_bytes(params.dtype)));
  const int64_t pixel = pixel_bytes(params.dtype), combined = params.combine_height * params.combine_width;
  const Extent outputs[] = {Extent::of(params.map, params.batch * params.height * params.width * pixel),
                            Extent::of(params.score, params.batch * pixel),
                            Extent::of(params.level_maps, params.batch * params.num_levels * combined * pixel)};
  for (size_t index = 0; index < (params.level_maps == nullptr ? 2 : 3); ++index) {
    for (const Extent& other : taken)
      if (outputs[index].overlaps(other))
        throw std::invalid_argument("out[" + std::to_string(index) +
                                    "]: wanted memory of its own, got memory that a feature or another output uses");
    taken.push_back(outputs[index]);
  }
}

}  // namespace stfpm_ext
