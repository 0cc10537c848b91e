// SPDX-License-Identifier: Apache-2.0
//
// The mathematics of the scorer and the loss, for host and device: the one place where the formulas stand.
// tests/reference.py states them in float64 NumPy, anomalib_stfpm_ext/ops/reference.py and loss.py in plain torch
// operations.
//
//   t = T / max(||T||, eps),  s = S / max(||S||, eps)     over the channels, eps = 1e-12
//   d = 1/2 ||t - s||^2                                   (equation 1 of arXiv 2103.04257)
//   u = upsample(d)                                       bilinear, half-pixel centres, no antialiasing
//   M = product of u^w, sum of w u, or maximum of w u     over the levels; the paper: product, w = 1
//   L = sum of mean of 2 d                                over the levels; over batch and positions, or the hardest
//
// d is computed from the dot products T.T, S.S and T.S, in double: a product of two float32 (or narrower) numbers
// is exact there, so that one pass over the features is enough, nothing overflows, and the cancellation in
// 1 - cos, which costs float32 half its digits at d = 1e-4, leaves an absolute error of 1e-15.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Always inlined, since compilers do not vectorise a loop with a call.
#ifdef __CUDACC__
#define STFPM_EXT_HOST_DEVICE __host__ __device__ inline
#elif defined(_MSC_VER)
#define STFPM_EXT_HOST_DEVICE __forceinline
#else
#define STFPM_EXT_HOST_DEVICE __attribute__((always_inline)) inline
#endif

namespace stfpm_ext {
// Internal linkage: each instruction set keeps its own copy, so that the linker cannot hand AVX-512 code to others.
namespace {

/// a * b + c, fused wherever the instruction set has it. Written out because the build turns contraction off.
template <class Real>
STFPM_EXT_HOST_DEVICE Real multiply_add(Real a, Real b, Real c) {
#if defined(__FMA__) || defined(__aarch64__) || defined(__CUDA_ARCH__)
  if constexpr (sizeof(Real) == sizeof(float))
    return ::fmaf(a, b, c);
  else
    return ::fma(a, b, c);
#else
  return a * b + c;
#endif
}

constexpr double kEpsilon = 1e-12;

/// 1 / max(||x||, eps), as torch.nn.functional.normalize has it; NaN stays NaN.
STFPM_EXT_HOST_DEVICE double inverse_norm(double squared_norm) {
  const double norm = ::sqrt(squared_norm);
  return 1.0 / (norm < kEpsilon ? kEpsilon : norm);
}

/// d of one position, from T.T, S.S and T.S; exactly 0 where teacher and student are equal.
STFPM_EXT_HOST_DEVICE double half_squared_distance(double teacher_teacher, double student_student,
                                                   double teacher_student) {
  const double a = inverse_norm(teacher_teacher);
  const double b = inverse_norm(student_student);
  const double distance = 0.5 * (teacher_teacher * a * a + student_student * b * b) - teacher_student * a * b;
  return distance < 0.0 ? 0.0 : distance;
}

/// A position's part in the loss, 2 d, and what its gradient needs: d(2 d)/dS = factor (T - projection S). In this form
/// float32 is enough for both, however small or large the norm of one side is.
struct Matching {
  double value, factor, projection;
};

/// With a = 1/max(||T||, eps) and b = 1/max(||S||, eps): d(2 d)/dS = -2 a b (T - (T.S) b^2 S). Below eps, b is a
/// constant, and it is -2 a b (T - b/a S).
STFPM_EXT_HOST_DEVICE Matching matching(double teacher_teacher, double student_student, double teacher_student) {
  const double a = inverse_norm(teacher_teacher);
  const double b = inverse_norm(student_student);
  return {2.0 * half_squared_distance(teacher_teacher, student_student, teacher_student), -2.0 * a * b,
          ::sqrt(student_student) < kEpsilon ? b / a : teacher_student * b * b};
}

/// One channel of the gradient. The caller has scaled the factor by what is beyond the position.
template <class Real>
STFPM_EXT_HOST_DEVICE Real matching_gradient(Real factor, Real projection, Real t, Real s) {
  return factor * multiply_add(-projection, s, t);
}

/// The two neighbours of an output pixel along one axis of a level, and their weights.
template <class Real, class Index>
struct Interpolation {
  Index low, high;
  Real low_weight, high_weight;
};

/// Samples of a level for each pixel of the map, along one axis.
STFPM_EXT_HOST_DEVICE double interpolation_scale(int64_t input_size, int64_t output_size) {
  return static_cast<double>(input_size) / static_cast<double>(output_size);
}

/// Source of output pixel `index` along an axis of `input_size` samples.
template <class Real, class Index>
STFPM_EXT_HOST_DEVICE Interpolation<Real, Index> interpolation(Index index, Index input_size, double scale) {
  if (scale == 1.0) return {index, index, Real(1), Real(0)};
  double source = (static_cast<double>(index) + 0.5) * scale - 0.5;
  if (source < 0.0) source = 0.0;
  Index low = static_cast<Index>(source);
  if (low > input_size - 1) low = input_size - 1;
  const Index high = low < input_size - 1 ? low + 1 : low;
  const Real high_weight = static_cast<Real>(source - static_cast<double>(low));
  return {low, high, Real(1) - high_weight, high_weight};
}

/// The ways to add a level's pixel to those before it, which start from `identity`. NaN on either side stays.
struct Product {
  double weight;  // 1, and not read
  static constexpr int identity = 1;
  template <class Real>
  STFPM_EXT_HOST_DEVICE Real operator()(Real combined, Real pixel) const {
    return combined * pixel;
  }
};

STFPM_EXT_HOST_DEVICE double power(double base, double exponent) { return ::pow(base, exponent); }

/// As above, for a base of at least 0. The result is off by 1e-7 of itself, and as if the base were off by 7e-8 of
/// itself. It has no branches and computes in float alone, so that compilers fill their vectors.
STFPM_EXT_HOST_DEVICE float power(float base, double exponent) {
  if (exponent == 0.0) return 1.0f;
  constexpr int32_t kHalfRoot = 0x3f3504f3;  // the bits of sqrt(1/2)
  constexpr float kRounding = 0x1.8p23f;     // a number that is added to it loses its fraction
  // base = 2^whole * mantissa, with the mantissa from sqrt(1/2) to sqrt(2). Numbers below 2^-126 have no such bits.
  const bool is_tiny = base < 0x1p-126f;
  const float normal = is_tiny ? base * 0x1p24f : base;
  int32_t bits;
  std::memcpy(&bits, &normal, sizeof bits);
  const int32_t shift = (bits - kHalfRoot) >> 23;
  bits -= static_cast<int32_t>(static_cast<uint32_t>(shift) << 23);
  float mantissa;
  std::memcpy(&mantissa, &bits, sizeof mantissa);
  const float whole = static_cast<float>(shift - (is_tiny ? 24 : 0));
  // log2(m) = 2 / ln(2) * artanh((m - 1) / (m + 1))
  const float x = (mantissa - 1.0f) / (mantissa + 1.0f), square = x * x;
  float series = multiply_add(1.0f / 9, square, 1.0f / 7);
  series = multiply_add(series, square, 1.0f / 5);
  series = multiply_add(series, square, 1.0f / 3);
  const float fraction = 2.88539008f * multiply_add(x * square, series, x);

  // The exponent in two parts: the first has 16 bits, and its product with the whole number is not rounded.
  const double limited = exponent < 0x1p40 ? exponent : 0x1p40;  // where every base but 1 ends at 0 or infinity
  float high = static_cast<float>(limited);
  std::memcpy(&bits, &high, sizeof bits);
  bits &= ~0xff;
  std::memcpy(&high, &bits, sizeof high);
  const float low = static_cast<float>(limited - static_cast<double>(high));
  const float exact = high * whole, rounded = multiply_add(high, fraction, low * (whole + fraction));

  float nearest = exact + rounded;
  nearest = nearest < -200.0f ? -200.0f : nearest > 200.0f ? 200.0f : nearest;  // beyond what float32 holds
  nearest = (nearest + kRounding) - kRounding;
  float rest = (exact - nearest) + rounded;
  rest = rest < -1.0f ? -1.0f : rest > 1.0f ? 1.0f : rest;
  rest *= 0.69314718f;  // 2^rest is now e^rest
  float power_of_rest = multiply_add(1.0f / 5040, rest, 1.0f / 720);
  power_of_rest = multiply_add(power_of_rest, rest, 1.0f / 120);
  power_of_rest = multiply_add(power_of_rest, rest, 1.0f / 24);
  power_of_rest = multiply_add(power_of_rest, rest, 1.0f / 6);
  power_of_rest = multiply_add(power_of_rest, rest, 1.0f / 2);
  power_of_rest = multiply_add(power_of_rest, rest, 1.0f);
  power_of_rest = multiply_add(power_of_rest, rest, 1.0f);
  const int32_t first = static_cast<int32_t>(nearest) >> 1, second = static_cast<int32_t>(nearest) - first;
  const int32_t first_bits = (first + 127) << 23, second_bits = (second + 127) << 23;
  float first_scale, second_scale;  // two powers of 2, since one may be beyond float32 where the result is not
  std::memcpy(&first_scale, &first_bits, sizeof first_scale);
  std::memcpy(&second_scale, &second_bits, sizeof second_scale);
  return base > 0.0f ? power_of_rest * first_scale * second_scale : base;  // 0 or NaN
}

// Weights apply in double: a weight that float32 rounds to 0 or infinity is neither.
struct WeightedProduct {
  double weight;
  static constexpr int identity = 1;
  template <class Real>
  STFPM_EXT_HOST_DEVICE Real operator()(Real combined, Real pixel) const {
    return combined * power(pixel, weight);
  }
};

struct WeightedSum {
  double weight;
  static constexpr int identity = 0;
  template <class Real>
  STFPM_EXT_HOST_DEVICE Real operator()(Real combined, Real pixel) const {
    return combined + static_cast<Real>(weight * static_cast<double>(pixel));
  }
};

struct WeightedMaximum {
  double weight;
  static constexpr int identity = 0;
  template <class Real>
  STFPM_EXT_HOST_DEVICE Real operator()(Real combined, Real pixel) const {
    const Real weighted = static_cast<Real>(weight * static_cast<double>(pixel));
    return combined >= weighted || combined != combined ? combined : weighted;
  }
};

}  // namespace
}  // namespace stfpm_ext
