// What becomes of a block's sums. Each takes them from the registers of main_loop.h; those that go through shared
// memory take over the memory of the stages, after a barrier of the caller's.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "main_loop.h"

namespace peft_kernels {

// A result in memory; strides count elements.
struct ResultView {
  void* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
  DType dtype;
};

// out = scale sums for the block at (row, column), element by element: narrow results and partial sums.
template <typename Shape>
__device__ __forceinline__ void store_scaled(
    const ResultView& out, int64_t first_row, int64_t first_column, float scale, int thread, Sums<Shape>& sums) {
  sums.for_each_pair(thread, [&](int row, int column, float first, float second) {
    const int64_t m = first_row + row, n = first_column + column;
    if (m >= out.rows) return;
    const int64_t index = m * out.row_stride + n * out.column_stride;
    if (n < out.columns) store_float(out.data, index, out.dtype, first * scale);
    if (n + 1 < out.columns) store_float(out.data, index + out.column_stride, out.dtype, second * scale);
  });
}

// A contiguous result [rows, columns] of the product's own type.
struct DenseView {
  void* data;
  const void* bias;  // [columns] of the same type; may be null
  int64_t bias_stride;
  int64_t rows, columns;
  bool vectors;  // whether its rows can be written 16 bytes at a time
};

// out = sums + bias, by way of shared memory: a lane holds pairs, and memory wants whole lines.
template <typename Shape>
__device__ __forceinline__ void store_dense(
    const DenseView& out, int64_t m, int64_t n, int thread, unsigned char* shared, Sums<Shape>& sums) {
  using Element = typename Shape::Element;
  using Staged = Tile<Element, Along::depth, Shape::kM, Shape::kN>;
  auto* staged = reinterpret_cast<Element*>(shared);
  const auto* bias = static_cast<const Element*>(out.bias);
  const int64_t rows = out.rows - m, columns = out.columns - n;
  sums.for_each_pair(thread, [&](int row, int column, float first, float second) {
    if (bias != nullptr) {
      if (column < columns) first += static_cast<float>(bias[(n + column) * out.bias_stride]);
      if (column + 1 < columns) second += static_cast<float>(bias[(n + column + 1) * out.bias_stride]);
    }
    const uint32_t low = static_cast<Element>(first).x, high = static_cast<Element>(second).x;
    *reinterpret_cast<uint32_t*>(staged + Staged::offset(row, column)) = low | high << 16;
  });
  __syncthreads();
  auto* to_block = static_cast<Element*>(out.data) + m * out.columns + n;
#pragma unroll
  for (int index = thread; index < Staged::kRows * Staged::kChunks; index += Shape::kThreads) {
    const int row = index / Staged::kChunks, chunk = index % Staged::kChunks, column = chunk * Staged::kChunk;
    if (row >= rows) continue;
    const Element* from = staged + Staged::chunk_offset(row, chunk);
    Element* to = to_block + row * out.columns + column;
    if (out.vectors && column + Staged::kChunk <= columns) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int c = 0; c < Staged::kChunk && column + c < columns; ++c) to[c] = from[c];
    }
  }
}

// A result that is wanted in few places only, in the order of the blocks they lie in.
struct EntriesView {
  const int64_t* block_begin;  // [blocks + 1]: a block's entries are block_begin[b] to block_begin[b + 1]
  const uint16_t* places;      // [entries]: row * kN + column within the block
  float* values;               // [entries]
};

// values = scale sums at the block's entries; the sums themselves never reach global memory.
template <typename Shape>
__device__ __forceinline__ void store_entries(
    const EntriesView& out, int64_t block, float scale, int thread, unsigned char* shared, Sums<Shape>& sums) {
  using Staged = Tile<float, Along::depth, Shape::kM, Shape::kN>;
  static_assert(Shape::kM * Shape::kN <= 1 << 16, "places have 16 bits");
  auto* staged = reinterpret_cast<float*>(shared);
  sums.for_each_pair(thread, [&](int row, int column, float first, float second) {
    *reinterpret_cast<float2*>(staged + Staged::offset(row, column)) = make_float2(first, second);
  });
  __syncthreads();
  for (int64_t entry = out.block_begin[block] + thread; entry < out.block_begin[block + 1]; entry += Shape::kThreads) {
    const int place = out.places[entry];
    out.values[entry] = staged[Staged::offset(place / Shape::kN, place % Shape::kN)] * scale;
  }
}

}  // namespace peft_kernels
