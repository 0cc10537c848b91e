// SPDX-License-Identifier: Apache-2.0
//
// Features as they cross from Python to the backends: pointers, sizes and strides. Knows nothing of torch, NumPy,
// pybind11 or CUDA. Every stride is in elements, not bytes.

#pragma once

#include <cstdint>

namespace stfpm_ext {

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };

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

}  // namespace stfpm_ext
