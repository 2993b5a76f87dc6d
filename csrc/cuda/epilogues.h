// What becomes of a block's sums. Each takes them from the registers of main_loop.h; those that go through shared
// memory take over the memory of the stages, after a barrier of the caller's.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "indices.h"
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

// A result [rows, columns] that is wanted at sorted flat positions only.
struct EntriesView {
  IndicesView indices;  // row * columns + column
  int64_t columns;
  void* values;  // [entries]
  DType dtype;
};

// The entries of a row that lie in the columns of one block.
struct RowEntries {
  int64_t first;
  int32_t count;
};

// values = sums at the entries of the block at (row, column), rows[i] those of its row i; the sums themselves never
// reach global memory. Eight lanes take a row: at a density of some percent it has about as many.
template <typename Shape>
__device__ __forceinline__ void store_entries(
    const EntriesView& out, const RowEntries (&rows)[Shape::kM], int64_t first_row, int64_t first_column, int thread,
    unsigned char* shared, Sums<Shape>& sums) {
  constexpr int kLanesPerRow = 8;
  using Staged = Tile<float, Along::depth, Shape::kM, Shape::kN>;
  auto* staged = reinterpret_cast<float*>(shared);
  sums.for_each_pair(thread, [&](int row, int column, float first, float second) {
    *reinterpret_cast<float2*>(staged + Staged::offset(row, column)) = make_float2(first, second);
  });
  __syncthreads();
#pragma unroll 1
  for (int row = thread / kLanesPerRow; row < Shape::kM; row += Shape::kThreads / kLanesPerRow) {
    const RowEntries entries = rows[row];
    const int64_t origin = (first_row + row) * out.columns + first_column;  // position of the row's first result here
    for (int i = thread % kLanesPerRow; i < entries.count; i += kLanesPerRow) {
      const int64_t entry = entries.first + i;
      const auto column = static_cast<int>(out.indices[entry] - origin);
      store_float(out.values, entry, out.dtype, staged[Staged::offset(row, column)]);
    }
  }
}

}  // namespace peft_kernels
