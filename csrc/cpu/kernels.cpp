// SPDX-License-Identifier: Apache-2.0
//
// The loops, compiled once per instruction set (STFPM_EXT_ISA) and vectorised by the compiler. Includes no
// standard header with inline functions: their copies could leak into objects of a lesser instruction set.

#include "kernels.h"

#include "kernels/distances.h"
#include "kernels/gradients.h"
#include "kernels/map_rows.h"
#include "kernels/max_pooling.h"

namespace stfpm_ext {
namespace {

void distances_of(DType dtype, const Level& level, int64_t image, int64_t begin, int64_t end, void* distances) {
  with_types(dtype, [&](auto element, auto real) {
    level_distances<decltype(element)>(level, image, begin, end, static_cast<decltype(real)*>(distances));
  });
}

double matching_of(DType dtype, const Level& level, int64_t image, int64_t begin, int64_t end, void* factors,
                   void* projections, void* values) {
  return with_types(dtype, [&](auto element, auto real) {
    return level_matching<decltype(element)>(level, image, begin, end, static_cast<decltype(real)*>(factors),
                                             static_cast<decltype(real)*>(projections),
                                             static_cast<decltype(real)*>(values));
  });
}

void matching_gradients_of(DType dtype, const Level& level, const MutableFeatures& gradients, int64_t image,
                           int64_t begin, int64_t end, const void* factors, const void* projections, double scale) {
  with_types(dtype, [&](auto element, auto real) {
    level_gradients<decltype(element)>(level, gradients, image, begin, end, static_cast<const decltype(real)*>(factors),
                                       static_cast<const decltype(real)*>(projections), scale);
  });
}

void max_pooling_of(const MaxPoolingParams& params, int64_t image, int64_t row, void* scratch) {
  with_types(params.dtype, [&](auto element, auto real) {
    pool_row<decltype(element)>(params, image, row, static_cast<decltype(real)*>(scratch));
  });
}

double rows_of(const AnomalyMapParams& params, const void* const* distances, const Columns* columns, int64_t image,
               int64_t begin, int64_t end, void* scratch) {
  if (params.dtype == DType::kFloat64)
    return map_rows(params, distances, columns, image, begin, end, static_cast<double*>(scratch));
  return map_rows(params, distances, columns, image, begin, end, static_cast<float*>(scratch));
}

}  // namespace

#define STFPM_EXT_CONCAT_(a, b) a##b
#define STFPM_EXT_CONCAT(a, b) STFPM_EXT_CONCAT_(a, b)
#define STFPM_EXT_STRING_(a) #a
#define STFPM_EXT_STRING(a) STFPM_EXT_STRING_(a)

extern const Kernels STFPM_EXT_CONCAT(kernels_, STFPM_EXT_ISA);
const Kernels STFPM_EXT_CONCAT(kernels_, STFPM_EXT_ISA) = {
    STFPM_EXT_STRING(STFPM_EXT_ISA), distances_of, rows_of, matching_of, matching_gradients_of, max_pooling_of};

}  // namespace stfpm_ext
