// Bits and arithmetic.
#pragma once

SIMT_INLINE int __popc(unsigned value) { return __builtin_popcount(value); }
SIMT_INLINE int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
SIMT_INLINE int __ffs(int value) { return __builtin_ffs(value); }
SIMT_INLINE int __ffsll(long long value) { return __builtin_ffsll(value); }
SIMT_INLINE int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
SIMT_INLINE int __clzll(long long value) {
  return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value));
}
SIMT_INLINE unsigned __brev(unsigned value) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (value >> i & 1u) << (31 - i);
  return reversed;
}
SIMT_INLINE unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

template <typename To, typename From>
SIMT_INLINE To simt_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, value);
}
SIMT_INLINE unsigned __float_as_uint(float value) { return simt_bits<unsigned>(value); }
SIMT_INLINE int __float_as_int(float value) { return simt_bits<int>(value); }
SIMT_INLINE float __uint_as_float(unsigned value) { return simt_bits<float>(value); }
SIMT_INLINE float __int_as_float(int value) { return simt_bits<float>(value); }

SIMT_INLINE float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
SIMT_INLINE float __fadd_rn(float a, float b) { return a + b; }
SIMT_INLINE float __fmul_rn(float a, float b) { return a * b; }
SIMT_INLINE float __fdividef(float a, float b) { return a / b; }
SIMT_INLINE float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
SIMT_INLINE float __expf(float value) { return std::exp(value); }

template <typename T>
SIMT_INLINE T __ldg(const T* address) {
  return *address;
}
