// SPDX-License-Identifier: Apache-2.0
//
// What crosses from Python to the backends: plain structs of pointers, sizes and strides, and the entry
// points. Knows nothing of torch, NumPy, pybind11 or CUDA. Every stride is in elements, not bytes.

#pragma once

#include <cstdint>

namespace stfpm_ext {

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };
enum class Combination { kProduct, kSum, kMaximum };

/// Bytes of a feature, and of a pixel of its map.
inline int64_t feature_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
inline int64_t pixel_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

/// Features of one network at one level, [B, C, H, W] in any memory layout.
struct Features {
  const void* data;
  int64_t batch_stride;
  int64_t channel_stride;
  int64_t row_stride;
  int64_t column_stride;
};

/// The same, to be written.
struct MutableFeatures {
  void* data;
  int64_t batch_stride;
  int64_t channel_stride;
  int64_t row_stride;
  int64_t column_stride;
};

struct Level {
  Features teacher;
  Features student;
  int64_t channels;
  int64_t height;
  int64_t width;
  double weight;  // exponent in the product, factor in the sum and the maximum
};

constexpr int kMaxLevels = 8;

/// One call of the scorer. The outputs are contiguous: float64 for float64 features, otherwise float32.
struct AnomalyMapParams {
  DType dtype;
  Combination combination;
  int num_levels;
  Level levels[kMaxLevels];
  int64_t batch;
  int64_t height;  // of the map, in pixels
  int64_t width;
  void* map;         // [B, 1, height, width]
  void* score;       // [B]
  void* level_maps;  // [B, num_levels, height, width], the upsampled distances without weights; or null
};

/// Computes maps and scores on at most `num_threads` threads; the result does not depend on their number.
void anomaly_map_cpu(const AnomalyMapParams& params, int num_threads);

/// Enqueues the same on a CUDA stream of `device`, where all pointers lead. Neither allocates nor synchronises.
/// `distances`: room for the distances of all levels, batch * sum of height * width elements of the map's type.
void anomaly_map_cuda(const AnomalyMapParams& params, void* distances, int device, void* stream);

}  // namespace stfpm_ext
