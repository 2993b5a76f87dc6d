// Fixed-width vectors for the CPU kernels, written once for every instruction set.
//
// The including file is compiled several times, with different -m flags; everything here has internal linkage, so that
// no function compiled for AVX-512 can be picked by the linker for a machine without it. For the same reason this
// header and its users stay free of the standard library's and libtorch's inline functions.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../common/philox.h"
#include "lora_kernels.h"

namespace peft_kernels {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// The type sums are formed in, and its vector.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Uint32Vector __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32Vector __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64Vector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfVector __attribute__((vector_size(kVectorBytes / 2)));  // as many lanes as FloatVector

template <typename acc>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatVector;
  using mask = Int32Vector;
};
template <>
struct VectorOf<double> {
  using type = DoubleVector;
  using mask = Int64Vector;
};
template <typename acc>
using Vector = typename VectorOf<acc>::type;
template <typename acc>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(acc));

template <typename V, typename T>
inline V load_unaligned(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V, typename T>
inline void store_unaligned(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

template <typename acc>
inline Vector<acc> splat(acc value) {
  return value - Vector<acc>{};  // folds to a broadcast; value + 0 does not, for -0
}

// --- activations to vectors of the accumulation type, and back ---

inline FloatVector load_vector(const float* from) { return load_unaligned<FloatVector>(from); }
inline DoubleVector load_vector(const double* from) { return load_unaligned<DoubleVector>(from); }

inline FloatVector load_vector(const bf16* from) {
  const Uint32Vector wide = __builtin_convertvector(load_unaligned<HalfVector>(from), Uint32Vector) << 16;
  return (FloatVector)wide;
}

inline void store_vector(float* to, FloatVector value) { store_unaligned(to, value); }
inline void store_vector(double* to, DoubleVector value) { store_unaligned(to, value); }

// Round to nearest even, as torch does; a NaN stays a (quiet) NaN.
inline void store_vector(bf16* to, FloatVector value) {
  const Uint32Vector bits = (Uint32Vector)value;
  const Uint32Vector rounded = (bits + (((bits >> 16) & 1u) + 0x7FFFu)) >> 16;
  const Uint32Vector is_nan = (Uint32Vector)(value != value);
  const Uint32Vector result = (rounded & ~is_nan) | (is_nan & 0x7FC0u);
  store_unaligned(to, __builtin_convertvector(result, HalfVector));
}

#if defined(__AVX512F__)
inline FloatVector load_vector(const fp16* from) {
  return (FloatVector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void store_vector(fp16* to, FloatVector value) {
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
inline FloatVector load_vector(const fp16* from) {
  return (FloatVector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void store_vector(fp16* to, FloatVector value) {
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// Half precision in software: scale the exponent through a float multiplication, which also gets subnormals right.
inline float fp16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFFu) << 13;
  uint32_t bits;
  if (magnitude >= 0x0F800000u) {  // infinity or NaN
    bits = magnitude | 0x7F800000u;
  } else {
    float value;
    std::memcpy(&value, &magnitude, sizeof(value));
    value *= 0x1p112f;
    std::memcpy(&bits, &value, sizeof(bits));
  }
  bits |= sign;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline uint16_t fp16_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return sign | 0x7E00u;   // NaN
  if (bits >= 0x477FF000u) return sign | 0x7C00u;  // rounds beyond 65504: infinity
  if (bits < 0x38800000u) {                        // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof(bits));
    return sign | static_cast<uint16_t>(bits - 0x3F000000u);
  }
  bits += 0xC8000FFFu + ((bits >> 13) & 1u);  // rebias the exponent, round to nearest even
  return sign | static_cast<uint16_t>(bits >> 13);
}

inline FloatVector load_vector(const fp16* from) {
  FloatVector value;
  for (int lane = 0; lane < kLanes<float>; ++lane) value[lane] = fp16_to_float(from[lane].bits);
  return value;
}
inline void store_vector(fp16* to, FloatVector value) {
  for (int lane = 0; lane < kLanes<float>; ++lane) to[lane].bits = fp16_from_float(value[lane]);
}
#endif

template <typename T>
using VectorFor = Vector<typename Accumulate<T>::type>;

// The first `count` lanes only; the rest read as zero.
template <typename T>
inline VectorFor<T> load_partial(const T* from, int count) {
  T lanes[kLanes<typename Accumulate<T>::type>] = {};
  std::memcpy(lanes, from, sizeof(T) * count);
  return load_vector(lanes);
}

template <typename T>
inline void store_partial(T* to, VectorFor<T> value, int count) {
  T lanes[kLanes<typename Accumulate<T>::type>];
  store_vector(lanes, value);
  std::memcpy(to, lanes, sizeof(T) * count);
}

// Lane i of `value` where bit i is set, else zero.
template <typename acc>
inline Vector<acc> keep_lanes(Vector<acc> value, uint64_t bits) {
  using Mask = typename VectorOf<acc>::mask;
  Mask own_bit;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes<acc>; ++lane) own_bit[lane] = 1 << lane;
  const Mask kept = ((Mask{} + static_cast<int32_t>(bits & 0xFFFF)) & own_bit) == own_bit;
  return (Vector<acc>)((Mask)value & kept);
}

// --- the dropout mask: words whose bit i is set where element i of 64, eight Philox groups, is kept ---

constexpr int kDrawBatch = 8 * kPhiloxGroup;

#if defined(__AVX512F__)

// The words of kRows rows, side by side: one alone would wait for its own rounds. A 64-bit lane carries one group's
// counter word in its low half; the high half is garbage that vpmuludq ignores.
template <int kRows>
inline void philox_words(RngState state, uint32_t first_group, uint32_t row, uint32_t threshold, uint64_t* keep) {
  const __m512i multiplier0 = _mm512_set1_epi64(kPhiloxMultiplier0);
  const __m512i multiplier1 = _mm512_set1_epi64(kPhiloxMultiplier1);
  const uint64_t seed = static_cast<uint64_t>(state.seed);
  const uint64_t offset = static_cast<uint64_t>(state.offset);
  // Groups lie in the lanes in the order 0, 4, 1, 5, ...: the unpacks below then yield them consecutively.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  __m512i c0[kRows], c1[kRows], c2[kRows], c3[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    c0[i] = _mm512_add_epi64(_mm512_set1_epi64(first_group), order);
    c1[i] = _mm512_set1_epi64(row + static_cast<uint32_t>(i));
    c2[i] = _mm512_set1_epi64(static_cast<int64_t>(offset));
    c3[i] = _mm512_set1_epi64(static_cast<int64_t>(offset >> 32));
  }
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  constexpr int kXorAll = 0x96;  // truth table of a ^ b ^ c
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const __m512i product0 = _mm512_mul_epu32(c0[i], multiplier0);
      const __m512i product1 = _mm512_mul_epu32(c2[i], multiplier1);
      // A shuffle brings the high halves down: shifts would compete with the multiplications for a port.
      c0[i] = _mm512_ternarylogic_epi64(_mm512_shuffle_epi32(product1, _MM_PERM_DDBB), c1[i], key0, kXorAll);
      c2[i] = _mm512_ternarylogic_epi64(_mm512_shuffle_epi32(product0, _MM_PERM_DDBB), c3[i], key1, kXorAll);
      c1[i] = product1;
      c3[i] = product0;
    }
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  constexpr __mmask16 kHighHalves = 0xAAAA;
  const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(threshold));
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    const __m512i words01 = _mm512_mask_mov_epi32(c0[i], kHighHalves, _mm512_slli_epi64(c1[i], 32));
    const __m512i words23 = _mm512_mask_mov_epi32(c2[i], kHighHalves, _mm512_slli_epi64(c3[i], 32));
    const uint64_t low = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(words01, words23), limit);
    const uint64_t high = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(words01, words23), limit);
    keep[i] = low | high << 32;
  }
}

#else

#if defined(__AVX2__)

inline void philox_quad(RngState state, uint32_t first_group, uint32_t row, uint16_t* draws) {
  const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0);
  const __m256i multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  const uint64_t seed = static_cast<uint64_t>(state.seed);
  const uint64_t offset = static_cast<uint64_t>(state.offset);
  __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(first_group), _mm256_setr_epi64x(0, 2, 1, 3));
  __m256i c1 = _mm256_set1_epi64x(row);
  __m256i c2 = _mm256_set1_epi64x(static_cast<int64_t>(offset));
  __m256i c3 = _mm256_set1_epi64x(static_cast<int64_t>(offset >> 32));
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m256i product0 = _mm256_mul_epu32(c0, multiplier0);
    const __m256i product1 = _mm256_mul_epu32(c2, multiplier1);
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c1), _mm256_set1_epi64x(k0));
    c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c3), _mm256_set1_epi64x(k1));
    c1 = product1;
    c3 = product0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  const __m256i words01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
  const __m256i words23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(draws), _mm256_unpacklo_epi64(words01, words23));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(draws + 16), _mm256_unpackhi_epi64(words01, words23));
}

inline void philox_batch(RngState state, uint32_t first_group, uint32_t row, uint16_t* draws) {
  philox_quad(state, first_group, row, draws);
  philox_quad(state, first_group + 4, row, draws + kDrawBatch / 2);
}

#else

inline void philox_batch(RngState state, uint32_t first_group, uint32_t row, uint16_t* draws) {
  for (uint32_t group = 0; group < kDrawBatch / kPhiloxGroup; ++group) {
    uint32_t words[4];
    philox_4x32_10(state, first_group + group, row, words);
    for (int lane = 0; lane < kPhiloxGroup; ++lane) {
      draws[group * kPhiloxGroup + lane] = static_cast<uint16_t>(philox_draw(words, lane));
    }
  }
}

#endif

template <int kRows>
inline void philox_words(RngState state, uint32_t first_group, uint32_t row, uint32_t threshold, uint64_t* keep) {
  for (uint32_t i = 0; i < kRows; ++i) {
    uint16_t draws[kDrawBatch];
    philox_batch(state, first_group, row + i, draws);
    uint64_t bits = 0;
    for (int lane = 0; lane < kDrawBatch; ++lane) bits |= static_cast<uint64_t>(draws[lane] >= threshold) << lane;
    keep[i] = bits;
  }
}

#endif

// Elements [column, column + 64) of rows [row, row + rows), column a multiple of 64.
inline void keep_rows(const Dropout& dropout, int64_t row, int64_t rows, int64_t column, uint64_t* keep) {
  if (dropout.keep != nullptr) {
    const uint64_t* drawn = dropout.keep + row * dropout.keep_stride + column / kDrawBatch;
    for (int64_t i = 0; i < rows; ++i) keep[i] = drawn[i * dropout.keep_stride];
    return;
  }
  if (dropout.threshold > 0xFFFF) {  // does not fit the comparison of 16-bit numbers
    for (int64_t i = 0; i < rows; ++i) keep[i] = 0;
    return;
  }
  const uint32_t group = static_cast<uint32_t>(column / kPhiloxGroup), first = static_cast<uint32_t>(row);
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    philox_words<4>(dropout.state, group, first + static_cast<uint32_t>(i), dropout.threshold, keep + i);
  }
  for (; i < rows; ++i) {
    philox_words<1>(dropout.state, group, first + static_cast<uint32_t>(i), dropout.threshold, keep + i);
  }
}

inline uint64_t keep_word(const Dropout& dropout, int64_t row, int64_t column) {
  uint64_t keep;
  keep_rows(dropout, row, 1, column, &keep);
  return keep;
}

}  // namespace
}  // namespace peft_kernels
