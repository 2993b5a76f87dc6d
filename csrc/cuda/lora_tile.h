// The tile of lora_accumulate_, out [M, C] += D * (scale hidden [M, r] factor [r, C]), one phase at a time.
//
// A phase is what one thread does between two barriers, as a function of its block and thread number. lora.cu strings
// the phases together with __syncthreads(); csrc/host/lora_on_host.h runs the same phases thread after thread on the
// CPU, so every index below is tested without a GPU.
//
// A block of 8 warps owns 32 x 256 elements of out, a thread 4 rows of 8 neighboring columns: per row one Philox call
// and one (16-bit types) or two (float) 16-byte accesses. Eight rows per thread would halve the reads of shared memory
// per multiplication, but no longer fit the registers of two blocks per multiprocessor together with the prefetch of
// out.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/philox.h"
#include "lora_arguments.h"

#if defined(__CUDA_ARCH__)
#define PK_PRAGMA(text) _Pragma(#text)
#define PK_UNROLL(...) PK_PRAGMA(unroll __VA_ARGS__)
#else
#define PK_UNROLL(...)
#endif

namespace peft_kernels {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kLanes * kWarps;
constexpr int kUnit = kPhiloxGroup;
constexpr int kTileColumns = kLanes * kUnit;
constexpr int kRankChunk = 16;
constexpr int kRows = 4;
constexpr int kTileRows = kWarps * kRows;

// `Count` values moved by 16-byte instructions.
template <typename T, int Count>
struct alignas(16) Vector {
  T values[Count];
};

// Where a thread works: the block's first row and column, and the thread's.
struct Position {
  int64_t tile_row, tile_column;
  int64_t row, column;
};

// Both operands of one chunk of the rank, in float. The odd multiples of four in the pitches spread the stores of a
// transposed factor over the banks and keep 16-byte alignment.
struct TileMemory {
  alignas(16) float factor[kRankChunk][kTileColumns + 4];
  alignas(16) float hidden[kRankChunk][kTileRows + 4];
};

// A thread's registers: its sums, and out as it was, still packed.
template <typename Out>
struct ThreadTile {
  using Packed = Vector<uint32_t, kUnit * sizeof(Out) / 4>;
  float sum[kRows][kUnit];
  Packed before[kRows];
};

PK_HOST_DEVICE int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

PK_HOST_DEVICE int64_t accumulate_blocks(int64_t rows, int64_t columns) {
  return divide_up(rows, kTileRows) * divide_up(columns, kTileColumns);
}

// Blocks walk along a row of tiles first: neighbors share their rows of hidden in L2.
PK_HOST_DEVICE Position position_of(int64_t block, int thread, int64_t columns) {
  const int64_t tiles_per_row = divide_up(columns, kTileColumns);
  const int64_t tile_row = block / tiles_per_row * kTileRows;
  const int64_t tile_column = block % tiles_per_row * kTileColumns;
  return {tile_row, tile_column, tile_row + thread / kLanes * kRows, tile_column + thread % kLanes * kUnit};
}

// Where column c of the tile lies in a row of TileMemory::factor. A lane reads its 8 columns as two 16-byte words; with
// the first words of all lanes side by side, and then the second ones, no two of the 8 lanes served at once share a
// bank.
PK_HOST_DEVICE int factor_slot(int column) {
  return column % kUnit / 4 * (kTileColumns / 2) + column / kUnit * 4 + column % 4;
}

PK_HOST_DEVICE bool whole_unit(int64_t column, int64_t columns) { return column + kUnit <= columns; }

PK_HOST_DEVICE int rank_depth(const AccumulateArguments& a, int64_t first) {
  return a.rank - first < kRankChunk ? static_cast<int>(a.rank - first) : kRankChunk;
}

// Phase 1: start the reads of out, so that they are in flight while the product is formed; clear the sums.
template <typename Out>
PK_HOST_DEVICE void load_out(const AccumulateArguments& a, const Position& p, ThreadTile<Out>& tile) {
  using Packed = typename ThreadTile<Out>::Packed;
  const Out* out = static_cast<const Out*>(a.out);
  PK_UNROLL()
  for (int i = 0; i < kRows; ++i) {
    tile.before[i] = Packed{};
    if (a.out_vectors && p.row + i < a.rows && whole_unit(p.column, a.columns)) {
      tile.before[i] = *reinterpret_cast<const Packed*>(out + (p.row + i) * a.out_row_stride + p.column);
    }
    PK_UNROLL()
    for (int c = 0; c < kUnit; ++c) tile.sum[i][c] = 0.0f;
  }
}

// Phase 2a: hidden[tile rows, first : first + depth] to shared memory, transposed; rows past the end become zero.
PK_HOST_DEVICE void load_hidden(
    const AccumulateArguments& a, const Position& p, int thread, int64_t first, TileMemory& shared) {
  const int depth = rank_depth(a, first);
  PK_UNROLL(2)
  for (int index = thread; index < kTileRows * kRankChunk; index += kThreads) {
    const int row = index / kRankChunk, k = index % kRankChunk;
    if (k >= depth) continue;
    const bool inside = p.tile_row + row < a.rows;
    const int64_t offset = (p.tile_row + row) * a.hidden_row_stride + (first + k) * a.hidden_rank_stride;
    shared.hidden[k][row] = inside ? a.hidden[offset] : 0.0f;
  }
}

// Phase 2b: factor[first : first + depth, tile columns] to shared memory, cast to float; columns past the end become 0.
template <typename Factor>
PK_HOST_DEVICE void load_factor(
    const AccumulateArguments& a, const Position& p, int thread, int64_t first, TileMemory& shared) {
  using Words = Vector<float, 4>;
  const int depth = rank_depth(a, first);
  const Factor* factor = static_cast<const Factor*>(a.factor) + first * a.factor_rank_stride;
  if (a.factor_vectors && p.tile_column + kTileColumns <= a.columns) {
    PK_UNROLL(1)
    for (int index = thread; index < depth * kLanes; index += kThreads) {
      const int k = index / kLanes, column = index % kLanes * kUnit;
      const auto from =
          *reinterpret_cast<const Vector<Factor, kUnit>*>(factor + k * a.factor_rank_stride + p.tile_column + column);
      Words words[2];
      PK_UNROLL()
      for (int c = 0; c < kUnit; ++c) words[c / 4].values[c % 4] = static_cast<float>(from.values[c]);
      *reinterpret_cast<Words*>(&shared.factor[k][factor_slot(column)]) = words[0];
      *reinterpret_cast<Words*>(&shared.factor[k][factor_slot(column + 4)]) = words[1];
    }
    return;
  }
  // Neighboring threads read along the smaller stride: lora_b.t() has its rank contiguous, a sliced lora_a its columns.
  // 256 threads cover 16 columns of the chunk at a time, or one whole row.
  static_assert(kThreads == kTileColumns && kRankChunk * kRankChunk == kThreads);
  const bool along_rank = a.factor_rank_stride < a.factor_column_stride;
  int k = along_rank ? thread % kRankChunk : 0;
  int column = along_rank ? thread / kRankChunk : thread;
  const int64_t step = along_rank ? kRankChunk * a.factor_column_stride : a.factor_rank_stride;
  factor += k * a.factor_rank_stride + (p.tile_column + column) * a.factor_column_stride;
  PK_UNROLL(4)
  for (int i = 0; i < kRankChunk; ++i) {
    if (k < depth) {
      const bool inside = p.tile_column + column < a.columns;
      shared.factor[k][factor_slot(column)] = inside ? static_cast<float>(*factor) : 0.0f;
    }
    factor += step;
    k += along_rank ? 0 : 1;
    column += along_rank ? kRankChunk : 0;
  }
}

// Phase 3: sums += hidden factor over the chunk, k ascending, so that the order of additions is the same in every run.
template <typename Out>
PK_HOST_DEVICE void multiply(int thread, int depth, const TileMemory& shared, ThreadTile<Out>& tile) {
  const int lane = thread % kLanes, row = thread / kLanes * kRows;
  PK_UNROLL(2)
  for (int k = 0; k < depth; ++k) {
    const auto low = *reinterpret_cast<const Vector<float, 4>*>(&shared.factor[k][factor_slot(lane * kUnit)]);
    const auto high = *reinterpret_cast<const Vector<float, 4>*>(&shared.factor[k][factor_slot(lane * kUnit + 4)]);
    const auto hidden = *reinterpret_cast<const Vector<float, kRows>*>(&shared.hidden[k][row]);
    PK_UNROLL()
    for (int i = 0; i < kRows; ++i) {
      PK_UNROLL()
      for (int c = 0; c < 4; ++c) {
        tile.sum[i][c] = fmaf(hidden.values[i], low.values[c], tile.sum[i][c]);
        tile.sum[i][c + 4] = fmaf(hidden.values[i], high.values[c], tile.sum[i][c + 4]);
      }
    }
  }
}

// Element c of a packed row, and back. 16-bit elements are moved two to a register.
template <typename Out, typename Packed>
PK_HOST_DEVICE float unpack(const Packed& packed, int c) {
  if constexpr (sizeof(Out) == 4) {
    float value;
    memcpy(&value, &packed.values[c], sizeof(value));
    return value;
  } else {
    const auto bits = static_cast<uint16_t>(packed.values[c / 2] >> (c % 2 * 16));
    return static_cast<float>(Out(bits, Out::from_bits()));
  }
}

template <typename Out, typename Packed>
PK_HOST_DEVICE void pack(Packed& packed, int c, float value) {
  if constexpr (sizeof(Out) == 4) {
    memcpy(&packed.values[c], &value, sizeof(value));
  } else {
    const uint32_t bits = static_cast<Out>(value).x;
    packed.values[c / 2] = c % 2 == 0 ? bits : packed.values[c / 2] | bits << 16;
  }
}

// Phase 4: out = before + D * (scale sum), rounded once.
template <typename Out>
PK_HOST_DEVICE void store_out(const AccumulateArguments& a, const Position& p, ThreadTile<Out>& tile) {
  using Packed = typename ThreadTile<Out>::Packed;
  if (p.column >= a.columns) return;
  const bool dropout = a.rng_state != nullptr;
  const RngState state = dropout ? RngState{a.rng_state[0], a.rng_state[1]} : RngState{0, 0};
  PK_UNROLL()
  for (int i = 0; i < kRows; ++i) {
    if (p.row + i >= a.rows) return;
    float* sum = tile.sum[i];
    uint32_t words[4];
    if (dropout) {
      philox_4x32_10(state, static_cast<uint32_t>(p.column / kUnit), static_cast<uint32_t>(p.row + i), words);
    }
    PK_UNROLL()
    for (int c = 0; c < kUnit; ++c) {
      const bool keep = !dropout || philox_draw(words, c) >= a.threshold;
      sum[c] = keep ? sum[c] * a.scale : 0.0f;
    }
    Out* out = static_cast<Out*>(a.out) + (p.row + i) * a.out_row_stride + p.column * a.out_column_stride;
    if (a.out_vectors && whole_unit(p.column, a.columns)) {
      Packed after;
      PK_UNROLL()
      for (int c = 0; c < kUnit; ++c) pack<Out>(after, c, unpack<Out>(tile.before[i], c) + sum[c]);
      *reinterpret_cast<Packed*>(out) = after;
    } else {
      PK_UNROLL()
      for (int c = 0; c < kUnit; ++c) {
        if (p.column + c >= a.columns) break;
        Out& element = out[c * a.out_column_stride];
        element = static_cast<Out>(static_cast<float>(element) + sum[c]);
      }
    }
  }
}

}  // namespace peft_kernels
