// Chunks of elements in other dtypes, for the kernels of sparse deltas; included once per capability, as simd.h is.
#pragma once

#include "simd.h"
#include "sparse_kernels.h"

namespace peft_kernels {
namespace {

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

template <typename T>
constexpr bool kHalf = kSame<T, bf16> || kSame<T, fp16>;

// count <= kChunk elements in another type; half precision and double meet by way of float, as in torch.
template <typename From, typename To>
void convert(const From* from, To* to, int64_t count) {
  if constexpr ((kHalf<From> && kSame<To, double>) || (kSame<From, double> && kHalf<To>)) {
    float between[kChunk];
    convert(from, between, count);
    convert(between, to, count);
  } else if constexpr (kHalf<From> || kHalf<To>) {
    int64_t i = 0;
    for (; i + kLanes<float> <= count; i += kLanes<float>) store_vector(to + i, load_vector(from + i));
    const int rest = static_cast<int>(count - i);
    if (rest > 0) store_partial(to + i, load_partial(from + i, rest), rest);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
  }
}

inline float square_root(float value) { return __builtin_sqrtf(value); }
inline double square_root(double value) { return __builtin_sqrt(value); }

}  // namespace
}  // namespace peft_kernels
