// exp of a vector; included once per capability, as simd.h is.
#pragma once

#include "simd.h"

namespace peft_kernels {
namespace {

// What exp of a type is made of: x = n ln 2 + r with |r| <= ln 2 / 2, and exp x = 2^n (1 + r + r^2 / 2! + ...). ln 2 is
// the sum of `high`, of which n times has no rounding, and `low`. Terms behind kTerms are below half a unit in the last
// place of the sum.
template <typename acc>
struct ExponentialOf;
template <>
struct ExponentialOf<float> {
  static constexpr int kTerms = 7, kMantissa = 23, kBias = 127;
  static constexpr float kLog2e = 1.44269504f, kHigh = 0.693145752f, kLow = 1.42860677e-6f;
  static constexpr float kLowest = -104.0f, kHighest = 89.0f;  // zero and infinity from there on
  static constexpr float kRound = 0x1.8p23f;                   // added to a small number, it leaves its integer part
};
template <>
struct ExponentialOf<double> {
  static constexpr int kTerms = 13, kMantissa = 52, kBias = 1023;
  static constexpr double kLog2e = 1.4426950408889634, kHigh = 0.693147180369123816490,
                          kLow = 1.90821492927058770002e-10;
  static constexpr double kLowest = -746.0, kHighest = 710.0;
  static constexpr double kRound = 0x1.8p52;
};

template <typename acc>
struct InverseFactorials {
  acc values[ExponentialOf<acc>::kTerms + 1];
  constexpr InverseFactorials() : values() {
    double factorial = 1.0;
    for (int k = 0; k <= ExponentialOf<acc>::kTerms; ++k) {
      factorial *= k == 0 ? 1 : k;
      values[k] = static_cast<acc>(1.0 / factorial);
    }
  }
};

// The terms that 16-bit results need: what is left out is 2.4e-6 of the sum.
constexpr int kShortTerms = 5;

#if defined(__AVX512F__)
// Here powers of two are scaled by in one instruction, and the smaller of two numbers is the second where one is NaN.
template <int kTerms = ExponentialOf<float>::kTerms>
inline FloatVector exponential(FloatVector given) {
  using Of = ExponentialOf<float>;
  constexpr InverseFactorials<float> inverse;
  const __m512 x =
      _mm512_min_ps(_mm512_set1_ps(Of::kHighest), _mm512_max_ps(_mm512_set1_ps(Of::kLowest), (__m512)given));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(Of::kLog2e)), 0);
  const __m512 near = _mm512_fnmadd_ps(n, _mm512_set1_ps(Of::kHigh), x);
  const __m512 rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(Of::kLow), near);
  __m512 sum = _mm512_set1_ps(inverse.values[kTerms]);
#pragma GCC unroll 16
  for (int k = kTerms - 1; k >= 0; --k) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(inverse.values[k]));
  return (FloatVector)_mm512_scalef_ps(sum, n);
}
#endif

// Within a unit in the last place; NaN stays NaN.
template <typename V>
inline V exponential(V x) {
  using acc = decltype(V{}[0] + V{}[0]);
  using Mask = typename VectorOf<acc>::mask;
  using Of = ExponentialOf<acc>;
  constexpr InverseFactorials<acc> inverse;
  const V lowest = splat<acc>(Of::kLowest), highest = splat<acc>(Of::kHighest);
  x = x < lowest ? lowest : x;  // written so that NaN passes
  x = x > highest ? highest : x;
  const V shifted = x * Of::kLog2e + Of::kRound;
  const V n = shifted - Of::kRound;
  const V rest = (x - n * Of::kHigh) - n * Of::kLow;
  V sum = splat<acc>(inverse.values[Of::kTerms]);
#pragma GCC unroll 16
  for (int k = Of::kTerms - 1; k >= 0; --k) sum = sum * rest + inverse.values[k];
  // 2^n in two factors, as n may lie beyond the exponents there are.
  const Mask power = (Mask)shifted - (Mask)splat<acc>(Of::kRound), half = power >> 1;
  const V first = (V)((half + Of::kBias) << Of::kMantissa), second = (V)((power - half + Of::kBias) << Of::kMantissa);
  return sum * first * second;
}

}  // namespace
}  // namespace peft_kernels
