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

/// The ways to add a level's pixel to what the levels before it have come to (Partial), which starts from `identity`.
/// NaN on either side stays.
struct Product {
  double weight;  // 1, and not read
  template <class Real>
  using Partial = Real;
  static constexpr int identity = 1;
  STFPM_EXT_HOST_DEVICE static bool counts() { return true; }
  template <class Real>
  STFPM_EXT_HOST_DEVICE Real operator()(Real combined, Real pixel) const {
    return combined * pixel;
  }
  template <class Real>
  STFPM_EXT_HOST_DEVICE static Real result(Real combined) {
    return combined;
  }
};

template <class To, class From>
STFPM_EXT_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

/// The sum of the logarithms, of base 2, of some levels' powers. For float32, in two parts: the first is exact, so that
/// the product is off by 1e-7 of itself.
template <class Real>
struct LogarithmSum {
  Real exact = 0, rest = 0;
  LogarithmSum() = default;
  STFPM_EXT_HOST_DEVICE LogarithmSum(Real exact, Real rest) : exact(exact), rest(rest) {}
  STFPM_EXT_HOST_DEVICE LogarithmSum(int) {}
};

/// Powers of pixels, multiplied: one logarithm for each level, one power of 2 for each pixel. Both have no branches,
/// divisions or tables, so that compilers fill their vectors. A level of weight 0 does not count, whatever its pixels
/// are.
struct WeightedProduct {
  template <class Real>
  using Partial = LogarithmSum<Real>;
  static constexpr int identity = 0;
  STFPM_EXT_HOST_DEVICE bool counts() const { return weight != 0.0; }

  STFPM_EXT_HOST_DEVICE explicit WeightedProduct(double weight) : weight(weight) {
    // Of the first part, multiples of 2^-15: its product with a whole number, and the sum of such products, is exact.
    const double limited = weight < 0x1p40 ? weight : 0x1p40;  // where every base but 1 ends at 0 or infinity
    high = bit_cast<float>(bit_cast<int32_t>(static_cast<float>(limited)) & ~0xff);
    if (limited < 1.0) high = static_cast<float>(static_cast<int32_t>(limited * 0x1p15)) * 0x1p-15f;
    low = static_cast<float>(limited - static_cast<double>(high));
  }

  STFPM_EXT_HOST_DEVICE LogarithmSum<double> operator()(LogarithmSum<double> sum, double pixel) const {
    return {sum.exact + weight * ::log2(pixel), 0.0};
  }
  STFPM_EXT_HOST_DEVICE static double result(LogarithmSum<double> sum) { return ::exp2(sum.exact); }

  STFPM_EXT_HOST_DEVICE LogarithmSum<float> operator()(LogarithmSum<float> sum, float pixel) const {
    // pixel = 2^whole * mantissa, with the mantissa from sqrt(1/2) to sqrt(2). What is below 2^-126 counts as 0: no
    // distance but 0 is below 1e-17.
    constexpr int32_t kHalfRoot = 0x3f3504f3;  // the bits of sqrt(1/2)
    const int32_t bits = bit_cast<int32_t>(pixel), shift = (bits - kHalfRoot) >> 23;
    const float x = bit_cast<float>(bits - static_cast<int32_t>(static_cast<uint32_t>(shift) << 23)) - 1.0f;
    float series = 0.12569488f;  // log2(1 + x) / x, off by 5e-8 at most
    series = multiply_add(series, x, -0.210059913f);
    series = multiply_add(series, x, 0.217133586f);
    series = multiply_add(series, x, -0.23855072f);
    series = multiply_add(series, x, 0.287693845f);
    series = multiply_add(series, x, -0.360720149f);
    series = multiply_add(series, x, 0.480920654f);
    series = multiply_add(series, x, -0.721347137f);
    series = multiply_add(series, x, 1.4426949f);
    const float whole = static_cast<float>(shift), fraction = x * series;
    const float of_nothing = sum.exact + (pixel - HUGE_VALF);  // -infinity or NaN
    return {pixel >= 0x1p-126f ? multiply_add(high, whole, sum.exact) : of_nothing,
            multiply_add(high, fraction, multiply_add(low, whole + fraction, sum.rest))};
  }

  STFPM_EXT_HOST_DEVICE static float result(LogarithmSum<float> sum) {
    constexpr float kRounding = 0x1.8p23f;  // a number that is added to it loses its fraction
    float nearest = sum.exact + sum.rest;
    nearest = nearest < -200.0f ? -200.0f : nearest > 200.0f ? 200.0f : nearest;  // beyond what float32 holds
    const float rounded = nearest + kRounding;
    const int32_t exponent = bit_cast<int32_t>(rounded) - bit_cast<int32_t>(kRounding);
    float rest = (sum.exact - (rounded - kRounding)) + sum.rest;
    rest = rest < -1.0f ? -1.0f : rest > 1.0f ? 1.0f : rest;
    float power = 0.000154780173f;  // 2^rest, off by 2e-9
    power = multiply_add(power, rest, 0.00134004317f);
    power = multiply_add(power, rest, 0.00961799453f);
    power = multiply_add(power, rest, 0.0555032722f);
    power = multiply_add(power, rest, 0.240226515f);
    power = multiply_add(power, rest, 0.693147207f);
    power = multiply_add(power, rest, 1.0f);
    // Two powers of 2, since one may be beyond float32 where the result is not.
    const int32_t first = exponent >> 1, second = exponent - first;
    const auto scale = [](int32_t of) {
      return bit_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(of + 127) << 23));
    };
    return power * scale(first) * scale(second);
  }

  double weight;
  float high, low;
};

// Weights apply in double: a weight that float32 rounds to 0 or infinity is neither.
struct WeightedSum {
  double weight;
  template <class Real>
  using Partial = Real;
  static constexpr int identity = 0;
  STFPM_EXT_HOST_DEVICE static bool counts() { return true; }
  template <class Real>
  STFPM_EXT_HOST_DEVICE Real operator()(Real combined, Real pixel) const {
    return combined + static_cast<Real>(weight * static_cast<double>(pixel));
  }
  template <class Real>
  STFPM_EXT_HOST_DEVICE static Real result(Real combined) {
    return combined;
  }
};

struct WeightedMaximum {
  double weight;
  template <class Real>
  using Partial = Real;
  static constexpr int identity = 0;
  STFPM_EXT_HOST_DEVICE static bool counts() { return true; }
  template <class Real>
  STFPM_EXT_HOST_DEVICE Real operator()(Real combined, Real pixel) const {
    const Real weighted = static_cast<Real>(weight * static_cast<double>(pixel));
    return combined >= weighted || combined != combined ? combined : weighted;
  }
  template <class Real>
  STFPM_EXT_HOST_DEVICE static Real result(Real combined) {
    return combined;
  }
};

}  // namespace
}  // namespace stfpm_ext
