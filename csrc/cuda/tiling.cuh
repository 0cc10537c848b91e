// SPDX-License-Identifier: Apache-2.0
//
// Before the first phase: how each level is read, and how its positions are cut into tiles for the blocks.

#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../levels.h"

namespace stfpm_ext {
namespace {

#ifndef STFPM_EXT_CUDA_THREADS
#define STFPM_EXT_CUDA_THREADS 256
#endif

constexpr int kThreads = STFPM_EXT_CUDA_THREADS;  // of a block
constexpr int kBlocksPerProcessor = 2;            // enough loads in flight, with 128 registers for each thread
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLineLanes = 8;  // lanes that read a line of 128 bytes, 16 bytes each

/// How a level's features lie in memory, and so which way of reading them is coalesced.
enum class Layout {
  kPlanes,        // positions of a channel are neighbours, and 16-byte loads are aligned
  kChannelsLast,  // channels of a position are neighbours, and 16-byte loads are aligned
  kStrided,       // anything else
};

/// Positions of a tile when a lane reads kVector of them at once.
template <int kVector>
constexpr int kPlaneTile = kVector == 1 ? kWarp : kLineLanes * kVector;
/// Lanes that share a position where its channels are neighbours. Of features of 2 bytes they read half a line at a
/// time: of 64 channels, which ResNet18's finest level has, each lane then has two loads in flight instead of one.
template <int kVector>
constexpr int kChannelLanes = kVector == 8 ? kLineLanes / 2 : kLineLanes;
template <int kVector>
constexpr int kChannelsLastTile = kThreads / kChannelLanes<kVector>;
constexpr int kMostPositions = kPlaneTile<8>;

/// How the positions of all levels are cut into tiles, and how each level is read.
struct Tiling {
  Layout layout[kMaxLevels];
  int tiles[kMaxLevels];  // of one image at each level
  int tiles_per_image;
  int64_t positions;           // of all levels and images
  int64_t offset[kMaxLevels];  // of each level's positions [B, H, W] in memory that holds those of all
};

struct Tile {
  int level, image, index;
};

/// Tile `index` of the tiles of `images` images. The coarse levels come first: their tiles are the largest, and blocks
/// that take turns end together when the last tiles are small.
__device__ Tile tile_of(const Tiling& tiling, int num_levels, int images, int index) {
  int level = num_levels - 1;
  for (; index >= tiling.tiles[level] * images; --level) index -= tiling.tiles[level] * images;
  return {level, index / tiling.tiles[level], index % tiling.tiles[level]};
}

// ---- host

constexpr int64_t kMostIndex = 1 << 30;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// `gradients`: those of the level, if they are written the way its features are read.
template <class T, class... Gradients>
Layout layout_of(const Level& level, int64_t batch, const Gradients&... gradients) {
  constexpr int64_t kVector = sizeof(uint4) / sizeof(T);
  const auto loads_are_aligned = [&](const auto& features, bool planes) {
    const auto fits = [](int64_t count, int64_t stride) { return count == 1 || stride % kVector == 0; };
    return reinterpret_cast<uintptr_t>(features.data) % sizeof(uint4) == 0 && fits(batch, features.batch_stride) &&
           (planes ? fits(level.channels, features.channel_stride)
                   : fits(level.height, features.row_stride) && fits(level.width, features.column_stride));
  };
  const auto planes = [&](const auto& features) {
    return (level.width == 1 || features.column_stride == 1) &&
           (level.height == 1 || features.row_stride == level.width) && level.height * level.width % kVector == 0 &&
           loads_are_aligned(features, true);
  };
  const auto channels_last = [&](const auto& features) {
    return features.channel_stride == 1 && level.channels % kVector == 0 && loads_are_aligned(features, false);
  };
  if (planes(level.teacher) && planes(level.student) && (planes(gradients) && ...)) return Layout::kPlanes;
  if (channels_last(level.teacher) && channels_last(level.student) && (channels_last(gradients) && ...))
    return Layout::kChannelsLast;
  return Layout::kStrided;
}

template <class T>
int64_t tile_size(Layout layout) {
  constexpr int kVector = sizeof(uint4) / sizeof(T);
  if (layout == Layout::kPlanes) return kPlaneTile<kVector>;
  return layout == Layout::kChannelsLast ? kChannelsLastTile<kVector> : kPlaneTile<1>;
}

/// Refuses sizes that 32-bit indices do not reach, with room for a last step beyond the end.
void check_area(const std::string& name, int64_t height, int64_t width) {
  if (height * width > kMostIndex)
    throw std::invalid_argument(name + ": wanted height x width of at most " + std::to_string(kMostIndex) +
                                " on CUDA, got " + std::to_string(height) + " x " + std::to_string(width));
}
void check_batch(int64_t batch, int64_t work_per_image) {
  if (batch > kMostIndex / work_per_image)
    throw std::invalid_argument("teacher: wanted a batch of at most " + std::to_string(kMostIndex / work_per_image) +
                                " on CUDA, got " + std::to_string(batch));
}

/// Cuts a level into tiles; levels come in order.
template <class T>
void add_level(Tiling& tiling, int index, const Level& level, int64_t batch, Layout layout) {
  check_area("teacher[" + std::to_string(index) + "]", level.height, level.width);
  tiling.layout[index] = layout;
  tiling.tiles[index] = static_cast<int>(ceil_div(level.height * level.width, tile_size<T>(layout)));
  tiling.tiles_per_image += tiling.tiles[index];
  tiling.offset[index] = tiling.positions;
  tiling.positions += batch * level.height * level.width;
}

}  // namespace
}  // namespace stfpm_ext
