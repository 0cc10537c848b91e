// SPDX-License-Identifier: Apache-2.0

#include "calls.h"

#include <stdexcept>

#include "overlap.h"

namespace stfpm_ext {
namespace {

DType dtype_from(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  throw std::invalid_argument("dtype '" + name + "' is not supported");
}

Combination combination_from(const std::string& name) {
  if (name == "product") return Combination::kProduct;
  if (name == "sum") return Combination::kSum;
  if (name == "maximum") return Combination::kMaximum;
  throw std::invalid_argument("combination '" + name + "' is not supported");
}

/// One level of a side; Any: Features or MutableFeatures.
template <class Any>
Any features_at(const Addresses& addresses, const AllDimensions& strides, size_t index) {
  const Dimensions& stride = strides.at(index);
  return {reinterpret_cast<void*>(addresses.at(index)), stride.batch, stride.channels, stride.height, stride.width};
}

/// Fills in dtype, number of levels, levels without weights, and batch. It refuses more levels than the struct has room
/// for, and at() refuses lists that are too short: memory beyond the end would be read or written.
template <class Params>
void read_levels(const Levels& levels, Params& params) {
  const auto& [dtype, shapes, teacher, teacher_strides, student, student_strides] = levels;
  params.dtype = dtype_from(dtype);
  if (shapes.empty() || shapes.size() > kMaxLevels) throw std::invalid_argument("1 to 8 levels are supported");
  params.num_levels = static_cast<int>(shapes.size());
  params.batch = shapes[0].batch;
  for (size_t i = 0; i < shapes.size(); ++i)
    params.levels[i] = {features_at<Features>(teacher, teacher_strides, i),
                        features_at<Features>(student, student_strides, i),
                        shapes[i].channels,
                        shapes[i].height,
                        shapes[i].width,
                        1.0};
}

}  // namespace

AnomalyMapParams params_from(const ScorerCall& call) {
  const auto& [levels, image_size, combine_size, weights, combine, map, score, level_maps] = call;
  AnomalyMapParams params{};
  read_levels(levels, params);
  for (size_t i = 0; i < static_cast<size_t>(params.num_levels); ++i) params.levels[i].weight = weights.at(i);
  params.combination = combination_from(combine);
  params.height = image_size[0];
  params.width = image_size[1];
  params.combine_height = combine_size[0];
  params.combine_width = combine_size[1];
  params.map = reinterpret_cast<void*>(map);
  params.score = reinterpret_cast<void*>(score);
  params.level_maps = reinterpret_cast<void*>(level_maps);
  check_overlap(params);
  return params;
}

MaxPoolingParams params_from(const PoolingCall& call) {
  const auto& [dtype, shape, pooled, features, maxima, window, stride, padding] = call;
  return {dtype_from(dtype),
          reinterpret_cast<const void*>(features),
          reinterpret_cast<void*>(maxima),
          shape.batch,
          shape.channels,
          shape.height,
          shape.width,
          pooled[0],
          pooled[1],
          window,
          stride,
          padding};
}

FeatureMatchingParams params_from(const LossCall& call) {
  const auto& [levels, scalars] = call;
  FeatureMatchingParams params{};
  read_levels(levels, params);
  params.scalars = reinterpret_cast<void*>(scalars);
  return params;
}

std::array<MutableFeatures, kMaxLevels> gradients_from(const Gradients& gradients, int num_levels) {
  const auto& [addresses, strides] = gradients;
  std::array<MutableFeatures, kMaxLevels> levels{};
  for (size_t i = 0; i < static_cast<size_t>(num_levels); ++i)
    levels[i] = features_at<MutableFeatures>(addresses, strides, i);
  return levels;
}

}  // namespace stfpm_ext
