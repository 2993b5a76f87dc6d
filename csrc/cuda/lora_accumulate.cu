// out [M, C] += D * (scale hidden [M, r] factor [r, C]) in place, on the CUDA cores in float.
//
// Bytes: out is read and written once, 4 M C in 16-bit types and 8 M C in float; hidden and factor come from L2 after
// their first read. FLOP: 2 M C r, which is 8 per byte at r = 16 and 16 bits: bound by memory up to about r = 32 (H100:
// 67 TFLOP/s over 3.0 TB/s), by arithmetic beyond [calculated]. With dropout one Philox call, some 60 integer
// instructions, per 8 elements.
//
// A block of 8 warps owns 32 x 256 elements of out, a thread 4 rows of 8 neighboring columns: per row one Philox call
// and one (16-bit types) or two (float) 16-byte accesses. Eight rows per thread would halve the reads of shared memory
// per multiplication, but no longer fit the registers of two blocks per multiprocessor together with the prefetch of
// out.
#include <cuda_runtime.h>
#include <launch.cuh>

#include <cmath>
#include <cstring>

#include "../common/philox.h"
#include "lora_kernels.h"
#include "views.h"

namespace peft_kernels {
namespace {

// Passed by value. `rng_state` is null without dropout; `scale` includes the 1 / (1 - p) of D.
struct AccumulateArguments {
  void* out;
  const float* hidden;
  const void* factor;
  const int64_t* rng_state;
  int64_t rows, columns, rank;
  int64_t out_row_stride, out_column_stride;
  int64_t hidden_row_stride, hidden_rank_stride;
  int64_t factor_rank_stride, factor_column_stride;
  float scale;
  uint32_t threshold;
  bool out_vectors, factor_vectors;  // whether 16-byte accesses along the columns are possible
};

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

__host__ __device__ constexpr int64_t divide_up(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

// Blocks walk along a row of tiles first: neighbors share their rows of hidden in L2.
__device__ __forceinline__ Position position_of(int64_t block, int thread, int64_t columns) {
  const int64_t tiles_per_row = divide_up(columns, kTileColumns);
  const int64_t tile_row = block / tiles_per_row * kTileRows;
  const int64_t tile_column = block % tiles_per_row * kTileColumns;
  return {tile_row, tile_column, tile_row + thread / kLanes * kRows, tile_column + thread % kLanes * kUnit};
}

// Where column c of the tile lies in a row of TileMemory::factor. A lane reads its 8 columns as two 16-byte words; with
// the first words of all lanes side by side, and then the second ones, no two of the 8 lanes served at once share a
// bank.
__device__ __forceinline__ int factor_slot(int column) {
  return column % kUnit / 4 * (kTileColumns / 2) + column / kUnit * 4 + column % 4;
}

__device__ __forceinline__ bool whole_unit(int64_t column, int64_t columns) { return column + kUnit <= columns; }

__device__ __forceinline__ int rank_depth(const AccumulateArguments& a, int64_t first) {
  return a.rank - first < kRankChunk ? static_cast<int>(a.rank - first) : kRankChunk;
}

// Phase 1: start the reads of out, so that they are in flight while the product is formed; clear the sums.
template <typename Out>
__device__ __forceinline__ void load_out(const AccumulateArguments& a, const Position& p, ThreadTile<Out>& tile) {
  using Packed = typename ThreadTile<Out>::Packed;
  const Out* out = static_cast<const Out*>(a.out);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    tile.before[i] = Packed{};
    if (a.out_vectors && p.row + i < a.rows && whole_unit(p.column, a.columns)) {
      tile.before[i] = *reinterpret_cast<const Packed*>(out + (p.row + i) * a.out_row_stride + p.column);
    }
#pragma unroll
    for (int c = 0; c < kUnit; ++c) tile.sum[i][c] = 0.0f;
  }
}

// Phase 2a: hidden[tile rows, first : first + depth] to shared memory, transposed; rows past the end become zero.
__device__ __forceinline__ void load_hidden(
    const AccumulateArguments& a, const Position& p, int thread, int64_t first, TileMemory& shared) {
  const int depth = rank_depth(a, first);
#pragma unroll 2
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
__device__ __forceinline__ void load_factor(
    const AccumulateArguments& a, const Position& p, int thread, int64_t first, TileMemory& shared) {
  using Words = Vector<float, 4>;
  const int depth = rank_depth(a, first);
  const Factor* factor = static_cast<const Factor*>(a.factor) + first * a.factor_rank_stride;
  if (a.factor_vectors && p.tile_column + kTileColumns <= a.columns) {
#pragma unroll 1
    for (int index = thread; index < depth * kLanes; index += kThreads) {
      const int k = index / kLanes, column = index % kLanes * kUnit;
      const auto from =
          *reinterpret_cast<const Vector<Factor, kUnit>*>(factor + k * a.factor_rank_stride + p.tile_column + column);
      Words words[2];
#pragma unroll
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
#pragma unroll 4
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
__device__ __forceinline__ void multiply(int thread, int depth, const TileMemory& shared, ThreadTile<Out>& tile) {
  const int lane = thread % kLanes, row = thread / kLanes * kRows;
#pragma unroll 2
  for (int k = 0; k < depth; ++k) {
    const auto low = *reinterpret_cast<const Vector<float, 4>*>(&shared.factor[k][factor_slot(lane * kUnit)]);
    const auto high = *reinterpret_cast<const Vector<float, 4>*>(&shared.factor[k][factor_slot(lane * kUnit + 4)]);
    const auto hidden = *reinterpret_cast<const Vector<float, kRows>*>(&shared.hidden[k][row]);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        tile.sum[i][c] = fmaf(hidden.values[i], low.values[c], tile.sum[i][c]);
        tile.sum[i][c + 4] = fmaf(hidden.values[i], high.values[c], tile.sum[i][c + 4]);
      }
    }
  }
}

// Element c of a packed row, and back. 16-bit elements are moved two to a register.
template <typename Out, typename Packed>
__device__ __forceinline__ float unpack(const Packed& packed, int c) {
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
__device__ __forceinline__ void pack(Packed& packed, int c, float value) {
  if constexpr (sizeof(Out) == 4) {
    memcpy(&packed.values[c], &value, sizeof(value));
  } else {
    const uint32_t bits = static_cast<Out>(value).x;
    packed.values[c / 2] = c % 2 == 0 ? bits : packed.values[c / 2] | bits << 16;
  }
}

// Phase 4: out = before + D * (scale sum), rounded once.
template <typename Out>
__device__ __forceinline__ void store_out(const AccumulateArguments& a, const Position& p, ThreadTile<Out>& tile) {
  using Packed = typename ThreadTile<Out>::Packed;
  if (p.column >= a.columns) return;
  const bool dropout = a.rng_state != nullptr;
  const RngState state = dropout ? RngState{a.rng_state[0], a.rng_state[1]} : RngState{0, 0};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (p.row + i >= a.rows) return;
    float* sum = tile.sum[i];
    uint32_t words[4];
    if (dropout) {
      philox_4x32_10(state, static_cast<uint32_t>(p.column / kUnit), static_cast<uint32_t>(p.row + i), words);
    }
#pragma unroll
    for (int c = 0; c < kUnit; ++c) {
      const bool keep = !dropout || philox_draw(words, c) >= a.threshold;
      sum[c] = keep ? sum[c] * a.scale : 0.0f;
    }
    Out* out = static_cast<Out*>(a.out) + (p.row + i) * a.out_row_stride + p.column * a.out_column_stride;
    if (a.out_vectors && whole_unit(p.column, a.columns)) {
      Packed after;
#pragma unroll
      for (int c = 0; c < kUnit; ++c) pack<Out>(after, c, unpack<Out>(tile.before[i], c) + sum[c]);
      *reinterpret_cast<Packed*>(out) = after;
    } else {
#pragma unroll
      for (int c = 0; c < kUnit; ++c) {
        if (p.column + c >= a.columns) break;
        Out& element = out[c * a.out_column_stride];
        element = static_cast<Out>(static_cast<float>(element) + sum[c]);
      }
    }
  }
}

template <typename Out, typename Factor>
__global__ void __launch_bounds__(kThreads, 2) accumulate_kernel(const __grid_constant__ AccumulateArguments a) {
  __shared__ TileMemory shared;
  const int thread = static_cast<int>(threadIdx.x);
  const Position position = position_of(blockIdx.x, thread, a.columns);
  ThreadTile<Out> tile;
  load_out(a, position, tile);
  for (int64_t first = 0; first < a.rank; first += kRankChunk) {
    load_hidden(a, position, thread, first, shared);
    load_factor<Factor>(a, position, thread, first, shared);
    __syncthreads();
    multiply(thread, rank_depth(a, first), shared, tile);
    __syncthreads();  // the next chunk overwrites what slower warps may still read
  }
  store_out(a, position, tile);
}

}  // namespace

void start_accumulate(
    const char* operation, const Tensor& out, const Tensor& hidden, const Tensor& factor, double scaling,
    const Dropout& dropout) {
  if (out.numel() == 0 || hidden.size(1) == 0) return;
  const DropoutView mask = dropout_view(dropout);
  AccumulateArguments a = {};
  a.out = out.mutable_data_ptr();
  a.hidden = static_cast<const float*>(hidden.const_data_ptr());
  a.factor = factor.const_data_ptr();
  a.rng_state = mask.rng_state;
  a.rows = out.size(0);
  a.columns = out.size(1);
  a.rank = hidden.size(1);
  a.out_row_stride = out.stride(0);
  a.out_column_stride = out.stride(1);
  a.hidden_row_stride = hidden.stride(0);
  a.hidden_rank_stride = hidden.stride(1);
  a.factor_rank_stride = factor.stride(0);
  a.factor_column_stride = factor.stride(1);
  a.scale = static_cast<float>(scaling * dropout.scale);
  a.threshold = mask.threshold;
  a.out_vectors = allows_vectors(a.out, a.out_row_stride, a.out_column_stride, out.element_size());
  a.factor_vectors = allows_vectors(a.factor, a.factor_rank_stride, a.factor_column_stride, factor.element_size());
  const Grid grid = {.x = divide_up(a.rows, kTileRows) * divide_up(a.columns, kTileColumns), .threads = kThreads};
  with_element_type(dtype_of(out.scalar_type()), [&](auto out_element) {
    with_element_type(dtype_of(factor.scalar_type()), [&](auto factor_element) {
      launch(
          operation, grid, accumulate_kernel<decltype(out_element), decltype(factor_element)>, a,
          {{"out", out, Access::write},
           {"hidden", hidden},
           {"factor", factor},
           {"rng_state", rng_operand(dropout, factor)}});
    });
  });
}

}  // namespace peft_kernels
