// Matrix tiles (AMX) as the kernels use them: configuration, loads, and float numbers as sums of bfloat16 terms.
//
// A tile instruction multiplies 16 x 32 by 32 x 16 bfloat16 numbers with float sums: 16 times the rate of AVX-512. A
// tile's rows are 64 bytes. The right operand holds pairs of k: 32-bit entry [p][n] is (k = 2p, k = 2p + 1) of column
// n.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "rounding.h"

namespace peft_kernels {
namespace {

constexpr int64_t kTile = 16;        // rows of a tile, columns of a float tile
constexpr int64_t kDepth = 32;       // k per tile instruction
constexpr int64_t kTileWords = 512;  // bfloat16 numbers in a tile

// Tile instructions by hand: gcc's intrinsics do not say which memory they read, clang's would not be ordered with
// these, and all want literals. Being volatile they keep their order, which is all that registers of the tiles need.
template <int tile>
inline void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
inline void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// sum += left right
template <int sum, int left, int right>
inline void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(left), "i"(right));
}

// Eight full tiles; released at the end, as other users of the tiles configure their own.
class TileScope {
 public:
  TileScope() {
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;  // palette
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;  // bytes per row
      config[48 + tile] = kTile;   // rows
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  ~TileScope() { __asm__ volatile("tilerelease"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

inline void zero_sums() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}

// Tiles 0 to 3 from and to memory, one after the other at tile_stride floats.
inline void load_sums(const float* from, int64_t tile_stride, int64_t row_stride) {
  tile_load<0>(from, row_stride * 4);
  tile_load<1>(from + tile_stride, row_stride * 4);
  tile_load<2>(from + 2 * tile_stride, row_stride * 4);
  tile_load<3>(from + 3 * tile_stride, row_stride * 4);
}

inline void store_sums(float* to, int64_t tile_stride, int64_t row_stride) {
  tile_store<0>(to, row_stride * 4);
  tile_store<1>(to + tile_stride, row_stride * 4);
  tile_store<2>(to + 2 * tile_stride, row_stride * 4);
  tile_store<3>(to + 3 * tile_stride, row_stride * 4);
}

inline __mmask16 first_floats(int64_t count) {
  return count >= 16 ? 0xFFFF : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

inline __mmask32 first_columns(int64_t count) {
  return count >= 32 ? 0xFFFFFFFFu : (1u << (count < 0 ? 0 : count)) - 1u;
}

inline __m512 load_first(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first_floats(count), from); }

inline __m512 from_bf16(__m512i low_halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(low_halves, 16)); }

inline __m512 bf16_low(__m512i values) { return from_bf16(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(values))); }
inline __m512 bf16_high(__m512i values) {
  return from_bf16(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(values, 1)));
}

// --- floats as sums of bfloat16 terms ---
//
// value = term[0] + term[1] + term[2] exactly: each term is the rounded rest of the ones before, a float whose low half
// is zero; bfloat16 is its high half. Infinity (and what rounds to it, from 3.39e38 on) has no rest; of NaN
// the first term is NaN.
template <int terms>
inline void split(__m512 value, __m512* term) {
  constexpr int kInfinite = 0x18;
  const __m512i high_half = _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000u));
  for (int t = 0; t < terms; ++t) {
    const __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(value), _mm512_set1_epi32(0x8000));
    term[t] = _mm512_castsi512_ps(_mm512_and_si512(rounded, high_half));
    if (t == 0) {
      // Rounding would carry a NaN of large payload over into zero, and cut one of small payload down to infinity.
      const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      term[0] = _mm512_mask_mov_ps(term[0], nan, _mm512_set1_ps(__builtin_nanf("")));
      value = _mm512_maskz_sub_ps(_knot_mask16(_mm512_fpclass_ps_mask(term[0], kInfinite)), value, term[0]);
    } else {
      value = _mm512_sub_ps(value, term[t]);
    }
  }
}

// Two split vectors as pairs (even, odd) of bfloat16, and one after the other.
inline __m512i pairs(__m512 even, __m512 odd) {
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), _mm512_castps_si512(odd));
}

inline __m512i joined(__m512 low, __m512 high) {
  const __m512i odd_words = _mm512_set_epi16(
      63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7,
      5, 3, 1);
  return _mm512_permutex2var_epi16(_mm512_castps_si512(low), odd_words, _mm512_castps_si512(high));
}

// The terms of two vectors as entries of a right tile, and of 32 numbers of one row as rows of left tiles.
template <int terms>
inline void split_pairs(__m512 even, __m512 odd, __m512i* entry) {
  __m512 even_term[terms], odd_term[terms];
  split<terms>(even, even_term);
  split<terms>(odd, odd_term);
  for (int t = 0; t < terms; ++t) entry[t] = pairs(even_term[t], odd_term[t]);
}

template <int terms>
inline void split_row(__m512 low, __m512 high, __m512i* row) {
  __m512 low_term[terms], high_term[terms];
  split<terms>(low, low_term);
  split<terms>(high, high_term);
  for (int t = 0; t < terms; ++t) row[t] = joined(low_term[t], high_term[t]);
}

// --- transposition ---

// 16 x 16 32-bit entries: to[i][lane] = from[lane][i]; rows of `from` are `stride` bytes apart, rows of `to` 64 bytes.
// Loads of a quarter row do the part that crosses lanes, so that two unpacks per vector are left.
inline void transpose_entries(const void* from, int64_t stride, void* to) {
  const char* rows = static_cast<const char*>(from);
  const auto quarters = [&](int row, int part) {
    const char* at = rows + row * stride + part * 16;
    const auto load = [&](int step) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 4 * step * stride));
    };
    const __m512i first = _mm512_inserti32x4(_mm512_castsi128_si512(load(0)), load(1), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(first, load(2), 2), load(3), 3);
  };
  for (int part = 0; part < 4; ++part) {
    const __m512i row0 = quarters(0, part), row1 = quarters(1, part), row2 = quarters(2, part),
                  row3 = quarters(3, part);
    const __m512i low01 = _mm512_unpacklo_epi32(row0, row1), high01 = _mm512_unpackhi_epi32(row0, row1);
    const __m512i low23 = _mm512_unpacklo_epi32(row2, row3), high23 = _mm512_unpackhi_epi32(row2, row3);
    __m512i* out = static_cast<__m512i*>(to) + part * 4;
    _mm512_store_si512(out, _mm512_unpacklo_epi64(low01, low23));
    _mm512_store_si512(out + 1, _mm512_unpackhi_epi64(low01, low23));
    _mm512_store_si512(out + 2, _mm512_unpacklo_epi64(high01, high23));
    _mm512_store_si512(out + 3, _mm512_unpackhi_epi64(high01, high23));
  }
}

// A corner of a float matrix of any strides as rows of 16: block[i][lane] = from[i * stride + lane * lane_stride], zero
// beyond `rows` and `lanes`.
template <int kRows>
inline void load_block(
    const float* from, int64_t stride, int64_t lane_stride, int64_t rows, int64_t lanes, float (*block)[16]) {
  rows = smaller(kRows, rows < 0 ? 0 : rows);
  lanes = smaller(16, lanes < 0 ? 0 : lanes);
  if (stride == 1 && rows == kRows && lanes == 16) {
    for (int i = 0; i < kRows; i += 16) transpose_entries(from + i, lane_stride * 4, block + i);
    return;
  }
  if (lane_stride == 1 || rows < kRows || lanes < 16) std::memset(block, 0, sizeof(float) * kRows * 16);
  if (lane_stride == 1) {
    for (int64_t i = 0; i < rows; ++i) _mm512_store_ps(block[i], load_first(from + i * stride, lanes));
    return;
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    for (int64_t i = 0; i < rows; ++i) block[i][lane] = from[i * stride + lane * lane_stride];
  }
}

// Two rows of 32 bfloat16 numbers as pairs: entries of columns 0 to 15 and of columns 16 to 31.
inline void pair_words(__m512i even, __m512i odd, __m512i* low, __m512i* high) {
  const __m512i low_order = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32,
      0);
  const __m512i high_order = _mm512_add_epi16(low_order, _mm512_set1_epi16(16));
  *low = _mm512_permutex2var_epi16(even, low_order, odd);
  *high = _mm512_permutex2var_epi16(even, high_order, odd);
}

}  // namespace
}  // namespace peft_kernels
