// LoRA kernels for bfloat16 activations on processors with matrix tiles (AMX).
//
// A tile instruction multiplies 16 x 32 by 32 x 16 bfloat16 numbers with float sums: 16 times the rate of AVX-512.
// The library GEMM runs at that rate, so the skinny products must too. Float operands keep their precision by being
// split into bfloat16 terms, f = f0 + f1 + f2, each the rounded rest of the one before:
//   shrink, grad   three terms of the factor (of hidden) against exact bfloat16 activations: float accuracy, 24 bits;
//   accumulate     two terms of hidden times two of the factor, 16 bits, for a result that is rounded to 8.
// Dropped elements are zeroed in bfloat16, which is exact; the scale of kept ones is in the packed operand.
//
// A tile's rows are 64 bytes. The right operand holds pairs of k: 32-bit entry [p][n] is (k = 2p, k = 2p + 1) of
// column n.
#include "lora_kernels.h"
#include "simd.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace peft_kernels {
namespace {

constexpr int64_t kTile = 16;        // rows of a tile, columns of a float tile
constexpr int64_t kDepth = 32;       // k per tile instruction
constexpr int64_t kTileWords = 512;  // bfloat16 numbers in a tile
constexpr int kTerms = 3;
constexpr int64_t kRowUnit = 64;    // rows per unit of parallel work: four tiles
constexpr int64_t kGradRows = 64;   // rows whose pairs are laid out at a time in grad
constexpr int64_t kGradBlocks = 4;  // rank blocks summed at a time in grad

// Tiles walk 16 or more rows side by side, a pattern that the hardware prefetchers do not follow: rows are fetched
// ahead by hand. Addresses beyond the matrix are harmless, a prefetch never faults.
constexpr int64_t kAheadColumns = 128;  // in shrink and accumulate: four cache lines further in the same row
constexpr int64_t kAheadRows = 16;      // in grad, which walks down a panel

inline void prefetch(const uint16_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// gcc's intrinsic does not say that it reads memory, so that the stores before it might be dropped or come too late.
template <int tile>
inline void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
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
    // gcc's intrinsic names only the first eight bytes as its input; the barrier keeps the stores to the others.
    __asm__ volatile("" : : "r"(config) : "memory");
    _tile_loadconfig(config);
  }
  ~TileScope() { _tile_release(); }
};

// Float to bfloat16 in the low 16 bits of each lane, round to nearest even. The conversion instruction would flush
// subnormals, and with them the low terms of small numbers.
inline __m512i round_to_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0));
}

inline __m512 from_bf16(__m512i low_halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(low_halves, 16)); }

// The terms of a vector of floats. Infinity and NaN stay in the first term: their rest would be NaN.
inline void split(__m512 value, int terms, __m512i* term) {
  const __mmask16 finite =
      _mm512_cmp_ps_mask(_mm512_abs_ps(value), _mm512_set1_ps(3.38e38f), _CMP_LT_OQ);  // and does not round to infinity
  for (int t = 0; t < terms; ++t) {
    term[t] = round_to_bf16(value);
    value = _mm512_maskz_sub_ps(finite, value, from_bf16(term[t]));
  }
}

inline __m512i pairs(__m512i even, __m512i odd) { return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)); }

inline __m512 load_first(const float* from, int64_t count) {
  const __mmask16 valid = count >= 16 ? 0xFFFF : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
  return _mm512_maskz_loadu_ps(valid, from);
}

// A corner of a float matrix of any strides as rows of 16: block[i][lane] = from[i * stride + lane * lane_stride], zero
// beyond `rows` and `lanes`. A transposing copy of scalars is several times faster here than gathers.
template <int kRows>
inline void load_block(
    const float* from, int64_t stride, int64_t lane_stride, int64_t rows, int64_t lanes, float (*block)[16]) {
  rows = smaller(kRows, rows < 0 ? 0 : rows);
  lanes = smaller(16, lanes < 0 ? 0 : lanes);
  if (lane_stride == 1 || rows < kRows || lanes < 16) std::memset(block, 0, sizeof(float) * kRows * 16);
  if (lane_stride == 1) {
    for (int64_t i = 0; i < rows; ++i) _mm512_store_ps(block[i], load_first(from + i * stride, lanes));
    return;
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    for (int64_t i = 0; i < rows; ++i) block[i][lane] = from[i * stride + lane * lane_stride];
  }
}

inline __mmask32 first_columns(int64_t count) {
  return count >= 32 ? 0xFFFFFFFFu : (1u << (count < 0 ? 0 : count)) - 1u;
}

// Which of 32 elements are kept: those drawn at or above the threshold, which may be 65536.
inline __mmask32 kept(const uint16_t* draws, uint32_t threshold) {
  if (threshold > 0xFFFF) return 0;
  return _mm512_cmpge_epu16_mask(_mm512_loadu_si512(draws), _mm512_set1_epi16(static_cast<int16_t>(threshold)));
}

// 32 activations from column c of a row, zero where dropped and beyond the matrix. `draws` is null without dropout.
inline __m512i load_activations(
    const uint16_t* row, int64_t c, int64_t columns, const uint16_t* draws, uint32_t threshold) {
  __mmask32 keep = first_columns(columns - c);
  if (draws != nullptr) keep &= kept(draws, threshold);
  return _mm512_maskz_loadu_epi16(keep, row + c);
}

// --- shrink: hidden = x factor^T. Packed: [rank blocks][k blocks][terms][tile of pairs (k, k + 1) by rank] ---

int64_t shrink_packed_bytes(const Factor& factor) {
  return divide_up(factor.rank, kTile) * divide_up(factor.columns, kDepth) * kTerms * kTileWords * 2;
}

void shrink_pack(const Factor& factor, int64_t begin, int64_t end, void* packed) {
  const float* data = static_cast<const float*>(factor.data);
  const __m512 scale = _mm512_set1_ps(static_cast<float>(factor.scale));
  const int64_t blocks = divide_up(factor.columns, kDepth);
  alignas(64) float corner[kDepth][16];  // [k][rank]
  for (int64_t j = 0; j < factor.rank; j += kTile) {
    for (int64_t k = begin; k < end; k += kDepth) {
      load_block<kDepth>(
          data + j * factor.rank_stride + k * factor.column_stride, factor.column_stride, factor.rank_stride,
          factor.columns - k, factor.rank - j, corner);
      uint16_t* tiles = static_cast<uint16_t*>(packed) + (j / kTile * blocks + k / kDepth) * kTerms * kTileWords;
      for (int64_t p = 0; p < kTile; ++p) {
        __m512i even[kTerms], odd[kTerms];
        split(_mm512_mul_ps(_mm512_load_ps(corner[2 * p]), scale), kTerms, even);
        split(_mm512_mul_ps(_mm512_load_ps(corner[2 * p + 1]), scale), kTerms, odd);
        for (int t = 0; t < kTerms; ++t) _mm512_storeu_si512(tiles + t * kTileWords + p * 32, pairs(even[t], odd[t]));
      }
    }
  }
}

// The left tiles of rows [m, m + 64) and columns [k, k + 32): in place where whole, else through `staged`.
struct LeftTiles {
  const void* tile[4];
  int64_t stride;
};

inline LeftTiles left_tiles(
    const Matrix& x, int64_t m, int64_t rows, int64_t k, const uint16_t* draws, uint32_t threshold, uint16_t* staged) {
  const uint16_t* data = static_cast<const uint16_t*>(x.data) + m * x.row_stride;
  for (int64_t i = 0; i < rows; ++i) prefetch(data + i * x.row_stride + k + kAheadColumns);
  LeftTiles left;
  if (draws == nullptr && rows == kRowUnit && k + kDepth <= x.columns) {
    for (int64_t t = 0; t < 4; ++t) left.tile[t] = data + t * kTile * x.row_stride + k;
    left.stride = x.row_stride * 2;
    return left;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const uint16_t* drawn = draws == nullptr ? nullptr : draws + i * kPanel + k % kPanel;
    _mm512_storeu_si512(staged + i * kDepth, load_activations(data + i * x.row_stride, k, x.columns, drawn, threshold));
  }
  for (int64_t t = 0; t < 4; ++t) left.tile[t] = staged + t * kTileWords;
  left.stride = 64;
  return left;
}

inline void draw_rows(const Dropout& dropout, int64_t m, int64_t rows, int64_t column, uint16_t* draws) {
  for (int64_t i = 0; i < rows; ++i) {
    philox_batch(
        dropout.state, static_cast<uint32_t>(column / kPhiloxGroup), static_cast<uint32_t>(m + i), draws + i * kPanel);
  }
}

// sums (four 16 x 16 float tiles) += left tiles times the three terms of one right tile.
inline void multiply_terms(const LeftTiles& left, const uint16_t* right, int64_t row_tiles) {
  tile_load<5>(right, 64);
  tile_load<6>(right + kTileWords, 64);
  tile_load<7>(right + 2 * kTileWords, 64);
  tile_load<4>(left.tile[0], left.stride);
  _tile_dpbf16ps(0, 4, 5);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(0, 4, 7);
  if (row_tiles == 1) return;
  tile_load<4>(left.tile[1], left.stride);
  _tile_dpbf16ps(1, 4, 5);
  _tile_dpbf16ps(1, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if (row_tiles == 2) return;
  tile_load<4>(left.tile[2], left.stride);
  _tile_dpbf16ps(2, 4, 5);
  _tile_dpbf16ps(2, 4, 6);
  _tile_dpbf16ps(2, 4, 7);
  if (row_tiles == 3) return;
  tile_load<4>(left.tile[3], left.stride);
  _tile_dpbf16ps(3, 4, 5);
  _tile_dpbf16ps(3, 4, 6);
  _tile_dpbf16ps(3, 4, 7);
}

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void store_sums(float* to, int64_t tile_stride, int64_t row_stride) {
  _tile_stored(0, to, row_stride * 4);
  _tile_stored(1, to + tile_stride, row_stride * 4);
  _tile_stored(2, to + 2 * tile_stride, row_stride * 4);
  _tile_stored(3, to + 3 * tile_stride, row_stride * 4);
}

inline void load_sums(const float* from, int64_t tile_stride, int64_t row_stride) {
  tile_load<0>(from, row_stride * 4);
  tile_load<1>(from + tile_stride, row_stride * 4);
  tile_load<2>(from + 2 * tile_stride, row_stride * 4);
  tile_load<3>(from + 3 * tile_stride, row_stride * 4);
}

void shrink(
    const Matrix& x, int64_t begin, int64_t end, const Factor& factor, const void* packed, const Hidden& hidden,
    const Dropout& dropout) {
  const TileScope tiles;
  const int64_t blocks = divide_up(x.columns, kDepth), rank = factor.rank;
  alignas(64) uint16_t staged[kRowUnit * kDepth] = {};
  alignas(64) uint16_t draws[kRowUnit * kPanel];
  alignas(64) float sums[kRowUnit * kTile];
  for (int64_t m = begin; m < end; m += kRowUnit) {
    const int64_t rows = smaller(kRowUnit, end - m);
    for (int64_t j = 0; j < rank; j += kTile) {
      const uint16_t* right = static_cast<const uint16_t*>(packed) + j / kTile * blocks * kTerms * kTileWords;
      zero_sums();
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t k = block * kDepth;
        if (dropout.active && k % kPanel == 0) draw_rows(dropout, m, rows, k, draws);
        const LeftTiles left = left_tiles(x, m, rows, k, dropout.active ? draws : nullptr, dropout.threshold, staged);
        multiply_terms(left, right + block * kTerms * kTileWords, divide_up(rows, kTile));
      }
      store_sums(sums, kTile * kTile, kTile);
      float* to = static_cast<float*>(hidden.data) + m * rank + j;
      const int64_t ranks = smaller(kTile, rank - j);
      for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * rank, sums + i * kTile, sizeof(float) * ranks);
    }
  }
}

// --- accumulate: out += hidden factor. A depth of 32 holds 16 ranks twice: [hidden0 | hidden1] on the left meets
// [factor0 ; factor0] and [factor1 ; factor1] on the right. Packed: [column tiles][rank blocks][2][tile of pairs] ---

int64_t accumulate_packed_bytes(const Factor& factor) {
  return divide_up(factor.columns, kDepth) * 2 * divide_up(factor.rank, kTile) * 2 * kTileWords * 2;
}

void accumulate_pack(const Factor& factor, int64_t begin, int64_t end, void* packed) {
  const float* data = static_cast<const float*>(factor.data);
  const __m512 scale = _mm512_set1_ps(static_cast<float>(factor.scale));
  const int64_t blocks = divide_up(factor.rank, kTile);
  alignas(64) float corner[kTile][16];  // [rank][column]
  for (int64_t c = begin; c < round_up(end, kDepth); c += kTile) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t j = block * kTile;
      load_block<kTile>(
          data + j * factor.rank_stride + c * factor.column_stride, factor.rank_stride, factor.column_stride,
          factor.rank - j, end - c, corner);
      uint16_t* tiles = static_cast<uint16_t*>(packed) + (c / kTile * blocks + block) * 2 * kTileWords;
      for (int64_t p = 0; p < kTile / 2; ++p) {
        __m512i even[2], odd[2];
        split(_mm512_mul_ps(_mm512_load_ps(corner[2 * p]), scale), 2, even);
        split(_mm512_mul_ps(_mm512_load_ps(corner[2 * p + 1]), scale), 2, odd);
        for (int t = 0; t < 2; ++t) {
          const __m512i entry = pairs(even[t], odd[t]);
          _mm512_storeu_si512(tiles + t * kTileWords + p * 32, entry);
          _mm512_storeu_si512(tiles + t * kTileWords + (p + kTile / 2) * 32, entry);
        }
      }
    }
  }
}

// Left tiles of 32 rows and `blocks` rank blocks: [rank blocks][2 row tiles][16 rows][hidden0 (16) | hidden1 (16)].
void split_hidden(const Hidden& hidden, int64_t m, int64_t rows, int64_t rank, int64_t blocks, uint16_t* tiles) {
  const float* data = static_cast<const float*>(hidden.data) + m * hidden.rank;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t j = rank + block * kTile;
    for (int64_t i = 0; i < 2 * kTile; ++i) {
      __m512i term[2];
      split(load_first(data + i * hidden.rank + j, i < rows ? hidden.rank - j : 0), 2, term);
      uint16_t* row = tiles + block * 2 * kTileWords + i * kDepth;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), _mm512_cvtepi32_epi16(term[0]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + kTile), _mm512_cvtepi32_epi16(term[1]));
    }
  }
}

// out[0:32] += update[0:32] for one row, dropped and cut to the valid columns.
inline void add_row(uint16_t* out, const float* low, const float* high, __mmask32 keep, __mmask32 valid) {
  const __m512i old = _mm512_maskz_loadu_epi16(valid, out);
  const __m512 old_low = from_bf16(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(old)));
  const __m512 old_high = from_bf16(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(old, 1)));
  const __m512 new_low = _mm512_mask_add_ps(old_low, static_cast<__mmask16>(keep), old_low, _mm512_load_ps(low));
  const __m512 new_high =
      _mm512_mask_add_ps(old_high, static_cast<__mmask16>(keep >> 16), old_high, _mm512_load_ps(high));
  const __m512i result = (__m512i)_mm512_cvtne2ps_pbh(new_high, new_low);
  _mm512_mask_storeu_epi16(out, valid, result);
}

// sums [2 column tiles][32 rows][16] = left tiles times the right tiles of 32 columns.
inline void multiply_columns(
    const uint16_t* left, const uint16_t* right, int64_t column_stride, int64_t blocks, float* sums) {
  zero_sums();
  for (int64_t block = 0; block < blocks; ++block) {
    const uint16_t* near = right + block * 2 * kTileWords;
    const uint16_t* far = near + column_stride;
    tile_load<4>(left + block * 2 * kTileWords, 64);
    tile_load<5>(left + (block * 2 + 1) * kTileWords, 64);
    tile_load<6>(near, 64);
    tile_load<7>(far, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
    tile_load<6>(near + kTileWords, 64);
    tile_load<7>(far + kTileWords, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_sums(sums, kTile * kTile, kTile);
}

void accumulate(
    const Matrix& out, int64_t begin, int64_t end, const Hidden& hidden, const Factor& factor, const void* packed,
    const Dropout& dropout) {
  const TileScope tiles;
  constexpr int64_t kRows = 2 * kTile;
  constexpr int64_t kRankBlocks = 8;  // ranks whose left tiles are kept at a time: 128
  const int64_t blocks = divide_up(factor.rank, kTile), column_stride = blocks * 2 * kTileWords;
  alignas(64) uint16_t left[kRankBlocks * 2 * kTileWords];
  alignas(64) uint16_t draws[kRows * kPanel];
  // Loads from a tile store must wait for it, so the sums of the next 32 columns are formed before these are used.
  alignas(64) float sums[2][2 * kRows * kTile];
  for (int64_t m = begin; m < end; m += kRows) {
    const int64_t rows = smaller(kRows, end - m);
    for (int64_t first = 0; first < blocks; first += kRankBlocks) {
      const int64_t count = smaller(kRankBlocks, blocks - first);
      const uint16_t* right = static_cast<const uint16_t*>(packed) + first * 2 * kTileWords;
      split_hidden(hidden, m, rows, first * kTile, count, left);
      multiply_columns(left, right, column_stride, count, sums[0]);
      for (int64_t c = 0, turn = 0; c < out.columns; c += kDepth, turn ^= 1) {
        if (c + kDepth < out.columns) {
          multiply_columns(left, right + (c + kDepth) / kTile * column_stride, column_stride, count, sums[turn ^ 1]);
        }
        if (dropout.active && c % kPanel == 0) draw_rows(dropout, m, rows, c, draws);
        const __mmask32 valid = first_columns(out.columns - c);
        uint16_t* to = static_cast<uint16_t*>(out.data) + m * out.row_stride + c;
        for (int64_t i = 0; i < rows; ++i) {
          prefetch(to + i * out.row_stride + kAheadColumns);
          const __mmask32 keep =
              dropout.active ? kept(draws + i * kPanel + c % kPanel, dropout.threshold) : 0xFFFFFFFFu;
          add_row(to + i * out.row_stride, sums[turn] + i * kTile, sums[turn] + (kRows + i) * kTile, keep, valid);
        }
      }
    }
  }
}

// --- grad: partial[j, c] = sum_m hidden[m, j] x[m, c]. Packed: [row blocks][rank blocks][terms][16 ranks][32 rows] ---

int64_t grad_packed_bytes(int64_t rows, int64_t rank) {
  return divide_up(rows, kDepth) * divide_up(rank, kTile) * kTerms * kTileWords * 2;
}

void grad_pack(const Hidden& hidden, int64_t rows, int64_t begin, int64_t end, void* packed) {
  const float* data = static_cast<const float*>(hidden.data);
  const int64_t rank = hidden.rank, blocks = divide_up(rank, kTile);
  alignas(64) float corner[kTile][16];  // [rank][row]
  for (int64_t m = begin; m < end; m += kDepth) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t j = block * kTile;
      uint16_t* tiles = static_cast<uint16_t*>(packed) + (m / kDepth * blocks + block) * kTerms * kTileWords;
      for (int64_t half = 0; half < kDepth; half += 16) {
        load_block<kTile>(data + (m + half) * rank + j, 1, rank, rank - j, rows - m - half, corner);
        for (int64_t i = 0; i < kTile; ++i) {
          __m512i term[kTerms];
          split(_mm512_load_ps(corner[i]), kTerms, term);
          for (int t = 0; t < kTerms; ++t) {
            uint16_t* to = tiles + t * kTileWords + i * kDepth + half;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(term[t]));
          }
        }
      }
    }
  }
}

// Pairs of rows (m, m + 1), entry by entry, for 64 columns: [row blocks of 32][4 column tiles][16 pairs][16 columns].
void pair_rows(const Matrix& x, int64_t m, int64_t end, int64_t column, const Dropout& dropout, uint16_t* paired) {
  const uint16_t* data = static_cast<const uint16_t*>(x.data);
  const __m512i low = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32,
      0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t row = m; row < round_up(end, kDepth); row += 2) {
    uint16_t draws[2 * kPanel];
    if (dropout.active) draw_rows(dropout, row, 2, column, draws);
    for (int64_t part = 0; part < kPanel; part += kDepth) {
      __m512i values[2];
      for (int64_t i = 0; i < 2; ++i) {
        prefetch(data + (row + kAheadRows + i) * x.row_stride + column + part);
        values[i] = row + i < end ? load_activations(
                                        data + (row + i) * x.row_stride, column + part, x.columns,
                                        dropout.active ? draws + i * kPanel + part : nullptr, dropout.threshold)
                                  : _mm512_setzero_si512();
      }
      uint16_t* to = paired + ((row - m) / kDepth * 4 + part / kTile) * kTileWords + (row - m) % kDepth / 2 * 32;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(values[0], low, values[1]));
      _mm512_storeu_si512(to + kTileWords, _mm512_permutex2var_epi16(values[0], high, values[1]));
    }
  }
}

// sums [16 ranks][64 columns] += hidden^T x for the paired rows of one panel.
inline void multiply_pairs(
    const uint16_t* left, int64_t left_stride, const uint16_t* right, int64_t steps, float* sums) {
  load_sums(sums, kTile, kPanel);
  for (int64_t step = 0; step < steps; ++step, left += left_stride, right += 4 * kTileWords) {
    tile_load<4>(left, 64);
    tile_load<5>(left + kTileWords, 64);
    tile_load<6>(left + 2 * kTileWords, 64);
    tile_load<7>(right, 64);
    _tile_dpbf16ps(0, 4, 7);
    _tile_dpbf16ps(0, 5, 7);
    _tile_dpbf16ps(0, 6, 7);
    tile_load<7>(right + kTileWords, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(1, 5, 7);
    _tile_dpbf16ps(1, 6, 7);
    tile_load<7>(right + 2 * kTileWords, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(2, 5, 7);
    _tile_dpbf16ps(2, 6, 7);
    tile_load<7>(right + 3 * kTileWords, 64);
    _tile_dpbf16ps(3, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
    _tile_dpbf16ps(3, 6, 7);
  }
  store_sums(sums, kTile, kPanel);
}

void grad(
    const Matrix& x, int64_t begin, int64_t end, int64_t first_column, int64_t end_column, int64_t rank,
    const void* packed, void* partial, const Dropout& dropout) {
  const TileScope tiles;
  const int64_t blocks = divide_up(rank, kTile);
  alignas(64) uint16_t paired[kGradRows * kPanel];
  alignas(64) float sums[kGradColumns * kGradBlocks * kTile];  // [panels][rank blocks][16 ranks][64 columns]
  constexpr int64_t kBlockSums = kTile * kPanel, kPanelSums = kGradBlocks * kBlockSums;
  for (int64_t first = 0; first < blocks; first += kGradBlocks) {
    const int64_t count = smaller(kGradBlocks, blocks - first);
    std::memset(sums, 0, sizeof(sums));
    for (int64_t m = begin; m < end; m += kGradRows) {
      const int64_t rows = smaller(kGradRows, end - m);
      for (int64_t c = first_column; c < end_column; c += kPanel) {
        pair_rows(x, m, m + rows, c, dropout, paired);
        for (int64_t block = 0; block < count; ++block) {
          const int64_t at = (m / kDepth * blocks + first + block) * kTerms * kTileWords;
          float* to = sums + (c - first_column) / kPanel * kPanelSums + block * kBlockSums;
          multiply_pairs(
              static_cast<const uint16_t*>(packed) + at, blocks * kTerms * kTileWords, paired, divide_up(rows, kDepth),
              to);
        }
      }
    }
    for (int64_t j = 0; j < smaller(count * kTile, rank - first * kTile); ++j) {
      float* to = static_cast<float*>(partial) + (first * kTile + j) * x.columns;
      for (int64_t c = first_column; c < end_column; c += kPanel) {
        const float* from = sums + (c - first_column) / kPanel * kPanelSums + j * kPanel;
        std::memcpy(to + c, from, sizeof(float) * smaller(kPanel, end_column - c));
      }
    }
  }
}

}  // namespace

const SkinnyKernels lora_kernels_amx_bf16 = {
    kRowUnit,        shrink_packed_bytes, shrink_pack,       shrink,    accumulate_packed_bytes,
    accumulate_pack, accumulate,          grad_packed_bytes, grad_pack, grad,
};

bool amx_bf16_usable() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
  uint32_t a, b, c, d;
  __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
  const bool tiles = (d >> 24 & 1) != 0 && (d >> 22 & 1) != 0;  // amx_tile, amx_bf16
  __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
  const bool conversion = (a >> 5 & 1) != 0;  // avx512_bf16
  return tiles && conversion && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace peft_kernels
