// LoRA kernels for bfloat16 activations on processors with matrix tiles (AMX).
//
// The library GEMM runs at the tiles' rate, so the skinny products must too. Float operands keep their precision by
// being split into bfloat16 terms (amx_tiles.h):
//   shrink, grad   three terms of the factor (of hidden) against exact bfloat16 activations: float accuracy, 24 bits;
//   accumulate     two terms of hidden times two of the factor, 16 bits, for a result that is rounded to 8.
// Dropped elements are zeroed in bfloat16, which is exact; the scale of kept ones is in the packed operand.
#include "amx_tiles.h"
#include "lora_kernels.h"
#include "simd.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace peft_kernels {
namespace {

constexpr int kTerms = 3;
constexpr int64_t kRowUnit = 64;    // rows per unit of parallel work: four tiles
constexpr int64_t kGradRows = 64;   // rows whose pairs are laid out at a time in grad
constexpr int64_t kGradBlocks = 4;  // rank blocks summed at a time in grad

// Tiles walk 16 or more rows side by side, a pattern that the hardware prefetchers do not follow: rows are fetched
// ahead by hand. Addresses beyond the matrix are harmless, a prefetch never faults.
constexpr int64_t kAheadColumns = 128;  // in shrink and accumulate: four cache lines further in the same row

inline void prefetch(const uint16_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }

// 32 activations from column c of a row, zero where dropped and beyond the matrix.
inline __m512i load_activations(const uint16_t* row, int64_t c, int64_t columns, uint64_t keep) {
  return _mm512_maskz_loadu_epi16(first_columns(columns - c) & static_cast<__mmask32>(keep), row + c);
}

constexpr uint64_t kKeepAll = ~uint64_t{0};

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
        __m512i entry[kTerms];
        split_pairs<kTerms>(
            _mm512_mul_ps(_mm512_load_ps(corner[2 * p]), scale),
            _mm512_mul_ps(_mm512_load_ps(corner[2 * p + 1]), scale), entry);
        for (int t = 0; t < kTerms; ++t) _mm512_storeu_si512(tiles + t * kTileWords + p * 32, entry[t]);
      }
    }
  }
}

// sums (tiles 0 to 3) += left tiles times the terms of one right tile, or the terms of one left tile times right tiles:
// `kept` are the terms, `moving` the four tiles. One sum is left alone for three products, until its last one is done,
// and so are the registers of the moving tiles.
struct MovingTiles {
  const void* tile[4];
  int64_t stride;
};

template <int sum, bool moving_left>
inline void multiply_moving(const MovingTiles& moving) {
  constexpr int at = 5 + sum % 3;
  tile_load<at>(moving.tile[sum], moving.stride);
  if constexpr (moving_left) {
    tile_multiply<sum, at, 4>();
  } else {
    tile_multiply<sum, 4, at>();
  }
}

template <bool moving_left>
inline void multiply_terms(const uint16_t* kept, const MovingTiles& moving, int64_t count) {
  for (int t = 0; t < kTerms; ++t) {
    tile_load<4>(kept + t * kTileWords, 64);
    multiply_moving<0, moving_left>(moving);
    if (count > 1) multiply_moving<1, moving_left>(moving);
    if (count > 2) multiply_moving<2, moving_left>(moving);
    if (count > 3) multiply_moving<3, moving_left>(moving);
  }
}

// The left tiles of rows [m, m + 64) and columns [k, k + 32): in place where whole, else through `staged`.
inline MovingTiles left_tiles(
    const Matrix& x, int64_t m, int64_t rows, int64_t k, const uint64_t* keep, uint16_t* staged) {
  const uint16_t* data = static_cast<const uint16_t*>(x.data) + m * x.row_stride;
  // At the end of the rows, the beginning of the next ones.
  const int64_t beyond = k + kAheadColumns - x.columns;
  const uint16_t* ahead = beyond < 0 ? data + k + kAheadColumns : data + kRowUnit * x.row_stride + beyond;
  for (int64_t i = 0; i < rows; ++i) prefetch(ahead + i * x.row_stride);
  MovingTiles left;
  if (keep == nullptr && rows == kRowUnit && k + kDepth <= x.columns) {
    for (int64_t t = 0; t < 4; ++t) left.tile[t] = data + t * kTile * x.row_stride + k;
    left.stride = x.row_stride * 2;
    return left;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const uint64_t kept = keep == nullptr ? kKeepAll : keep[i] >> k % kPanel;
    _mm512_storeu_si512(staged + i * kDepth, load_activations(data + i * x.row_stride, k, x.columns, kept));
  }
  for (int64_t t = 0; t < 4; ++t) left.tile[t] = staged + t * kTileWords;
  left.stride = 64;
  return left;
}

void shrink(
    const Matrix& x, int64_t begin, int64_t end, const Factor& factor, const void* packed, const Hidden& hidden,
    const Dropout& dropout) {
  const TileScope tiles;
  const int64_t blocks = divide_up(x.columns, kDepth), rank = factor.rank;
  alignas(64) uint16_t staged[kRowUnit * kDepth] = {};
  uint64_t keep[kRowUnit];
  alignas(64) float sums[kRowUnit * kTile];
  for (int64_t m = begin; m < end; m += kRowUnit) {
    const int64_t rows = smaller(kRowUnit, end - m);
    for (int64_t j = 0; j < rank; j += kTile) {
      const uint16_t* right = static_cast<const uint16_t*>(packed) + j / kTile * blocks * kTerms * kTileWords;
      zero_sums();
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t k = block * kDepth;
        if (dropout.active && k % kPanel == 0) keep_rows(dropout, m, rows, k, keep);
        const MovingTiles left = left_tiles(x, m, rows, k, dropout.active ? keep : nullptr, staged);
        multiply_terms<true>(right + block * kTerms * kTileWords, left, divide_up(rows, kTile));
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
        __m512i entry[2];
        split_pairs<2>(
            _mm512_mul_ps(_mm512_load_ps(corner[2 * p]), scale),
            _mm512_mul_ps(_mm512_load_ps(corner[2 * p + 1]), scale), entry);
        for (int t = 0; t < 2; ++t) {
          _mm512_storeu_si512(tiles + t * kTileWords + p * 32, entry[t]);
          _mm512_storeu_si512(tiles + t * kTileWords + (p + kTile / 2) * 32, entry[t]);
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
      __m512 term[2];
      split<2>(load_first(data + i * hidden.rank + j, i < rows ? hidden.rank - j : 0), term);
      _mm512_storeu_si512(tiles + block * 2 * kTileWords + i * kDepth, joined(term[0], term[1]));
    }
  }
}

// out[0:32] += update[0:32] for one row, dropped and cut to the valid columns.
inline void add_row(uint16_t* out, const float* low, const float* high, __mmask32 keep, __mmask32 valid) {
  const __m512i old = _mm512_maskz_loadu_epi16(valid, out);
  const __m512 old_low = bf16_low(old), old_high = bf16_high(old);
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
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 5, 6>();
    tile_multiply<2, 4, 7>();
    tile_multiply<3, 5, 7>();
    tile_load<6>(near + kTileWords, 64);
    tile_load<7>(far + kTileWords, 64);
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 5, 6>();
    tile_multiply<2, 4, 7>();
    tile_multiply<3, 5, 7>();
  }
  store_sums(sums, kTile * kTile, kTile);
}

void accumulate(
    const Matrix& out, int64_t begin, int64_t end, const Hidden& hidden, const Factor& factor, const void* packed,
    const Dropout& dropout) {
  if (out.columns == 0) return;  // there is no first product to form ahead
  const TileScope tiles;
  constexpr int64_t kRows = 2 * kTile;
  constexpr int64_t kRankBlocks = 8;  // ranks whose left tiles are kept at a time: 128
  const int64_t blocks = divide_up(factor.rank, kTile), column_stride = blocks * 2 * kTileWords;
  alignas(64) uint16_t left[kRankBlocks * 2 * kTileWords];
  uint64_t keep[kRows];
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
        if (dropout.active && c % kPanel == 0) keep_rows(dropout, m, rows, c, keep);
        const __mmask32 valid = first_columns(out.columns - c);
        uint16_t* to = static_cast<uint16_t*>(out.data) + m * out.row_stride + c;
        for (int64_t i = 0; i < rows; ++i) {
          prefetch(to + i * out.row_stride + kAheadColumns);
          const __mmask32 kept = static_cast<__mmask32>(dropout.active ? keep[i] >> c % kPanel : kKeepAll);
          add_row(to + i * out.row_stride, sums[turn] + i * kTile, sums[turn] + (kRows + i) * kTile, kept, valid);
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
  alignas(64) float corner[2][kTile][16];  // [half][rank][row]
  for (int64_t m = begin; m < end; m += kDepth) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t j = block * kTile;
      uint16_t* tiles = static_cast<uint16_t*>(packed) + (m / kDepth * blocks + block) * kTerms * kTileWords;
      for (int64_t half = 0; half < kDepth; half += 16) {
        load_block<kTile>(data + (m + half) * rank + j, 1, rank, rank - j, rows - m - half, corner[half / 16]);
      }
      for (int64_t i = 0; i < kTile; ++i) {
        __m512i row[kTerms];
        split_row<kTerms>(_mm512_load_ps(corner[0][i]), _mm512_load_ps(corner[1][i]), row);
        for (int t = 0; t < kTerms; ++t) _mm512_storeu_si512(tiles + t * kTileWords + i * kDepth, row[t]);
      }
    }
  }
}

// Pairs of rows (m, m + 1), entry by entry, for 64 columns: [row blocks of 32][4 column tiles][16 pairs][16 columns].
// `next` is where the panel to come begins; its rows are fetched as those of this one are read.
void pair_rows(
    const Matrix& x, int64_t m, int64_t end, int64_t column, const Dropout& dropout, const uint16_t* next,
    uint16_t* paired) {
  const uint16_t* data = static_cast<const uint16_t*>(x.data);
  for (int64_t row = m; row < round_up(end, kDepth); row += 2) {
    uint64_t keep[2] = {kKeepAll, kKeepAll};
    if (dropout.active) keep_rows(dropout, row, smaller(2, end - row), column, keep);  // none beyond the end
    for (int64_t part = 0; part < kPanel; part += kDepth) {
      __m512i values[2];
      for (int64_t i = 0; i < 2; ++i) {
        prefetch(next + (row - m + i) * x.row_stride + part);
        values[i] = row + i < end
                        ? load_activations(data + (row + i) * x.row_stride, column + part, x.columns, keep[i] >> part)
                        : _mm512_setzero_si512();
      }
      uint16_t* to = paired + ((row - m) / kDepth * 4 + part / kTile) * kTileWords + (row - m) % kDepth / 2 * 32;
      __m512i low, high;
      pair_words(values[0], values[1], &low, &high);
      _mm512_storeu_si512(to, low);
      _mm512_storeu_si512(to + kTileWords, high);
    }
  }
}

// sums [16 ranks][64 columns] += hidden^T x for the paired rows of one panel.
inline void multiply_pairs(
    const uint16_t* left, int64_t left_stride, const uint16_t* right, int64_t steps, float* sums) {
  load_sums(sums, kTile, kPanel);
  for (int64_t step = 0; step < steps; ++step, left += left_stride, right += 4 * kTileWords) {
    multiply_terms<false>(left, {{right, right + kTileWords, right + 2 * kTileWords, right + 3 * kTileWords}, 64}, 4);
  }
  store_sums(sums, kTile, kPanel);
}

void grad(
    const Matrix& x, int64_t begin, int64_t end, int64_t first_column, int64_t end_column, int64_t rank,
    const void* packed, void* partial, const Dropout& dropout) {
  const TileScope tiles;
  const int64_t blocks = divide_up(rank, kTile);
  const uint16_t* data = static_cast<const uint16_t*>(x.data);
  alignas(64) uint16_t paired[kGradRows * kPanel];
  alignas(64) float sums[kGradColumns * kGradBlocks * kTile];  // [panels][rank blocks][16 ranks][64 columns]
  constexpr int64_t kBlockSums = kTile * kPanel, kPanelSums = kGradBlocks * kBlockSums;
  for (int64_t first = 0; first < blocks; first += kGradBlocks) {
    const int64_t count = smaller(kGradBlocks, blocks - first);
    std::memset(sums, 0, sizeof(sums));
    for (int64_t m = begin; m < end; m += kGradRows) {
      const int64_t rows = smaller(kGradRows, end - m);
      for (int64_t c = first_column; c < end_column; c += kPanel) {
        const bool last_panel = c + kPanel >= end_column;
        const int64_t next_row = last_panel ? m + kGradRows : m, next_column = last_panel ? first_column : c + kPanel;
        pair_rows(x, m, m + rows, c, dropout, data + next_row * x.row_stride + next_column, paired);
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
