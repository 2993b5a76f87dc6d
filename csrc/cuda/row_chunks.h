// A matrix in chunks of 16 bytes: a thread has one chunk of columns of a few neighboring rows, and all its reads are
// under way before it uses the first. Where columns are no neighbors, rows do not start at multiples of 16 bytes, or
// end in between, elements are read and written one by one.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <type_traits>

#include "launch_arguments.h"
#include "slice_entries.h"
#include "views.h"

namespace peft_kernels {

constexpr int kChunkThreads = 256;

template <typename Element>
constexpr int kChunk = kChunkBytes / sizeof(Element);

// The 16 bytes of neighboring elements as they are in memory, 16-bit ones two to a register.
template <typename Element>
struct Chunk {
  using Bits = std::conditional_t<sizeof(Element) == 4, uint32_t, uint16_t>;
  uint32_t words[4];

  __device__ __forceinline__ Bits bits(int c) const {
    return sizeof(Element) == 4 ? words[c] : static_cast<Bits>(words[c / 2] >> c % 2 * 16);
  }
  __device__ __forceinline__ void set_bits(int c, uint32_t value) {
    if constexpr (sizeof(Element) == 4) {
      words[c] = value;
    } else {
      words[c / 2] = c % 2 == 0 ? value : words[c / 2] | value << 16;
    }
  }
  __device__ __forceinline__ float operator[](int c) const {
    if constexpr (sizeof(Element) == 4) {
      return __uint_as_float(words[c]);
    } else {
      return static_cast<float>(Element(bits(c), Element::from_bits()));
    }
  }
  __device__ __forceinline__ void set(int c, float value) {
    if constexpr (sizeof(Element) == 4) {
      words[c] = __float_as_uint(value);
    } else {
      set_bits(c, static_cast<Element>(value).x);
    }
  }
};

struct RowsView {
  void* data;
  int64_t row_stride, column_stride;
  bool vectors;
};

inline RowsView rows_view(const Tensor& matrix, void* data) {
  const int64_t row_stride = matrix.stride(0), column_stride = matrix.stride(1);
  return {data, row_stride, column_stride, allows_vectors(data, row_stride, column_stride, matrix.element_size())};
}
inline RowsView rows_view(const Tensor& matrix) {
  return rows_view(matrix, const_cast<void*>(matrix.const_data_ptr()));
}

struct Size {
  int64_t rows, columns;
  bool narrow;  // whether chunks can be counted with 32 bits
};

inline Size size_of(const Tensor& matrix) { return {matrix.size(0), matrix.size(1), fits_32_bits(matrix.numel())}; }

// Of a matrix, the columns from `column` on of `count` rows from `row` on; no rows for a thread past the end.
struct Place {
  int64_t row, column;
  int count;
};

template <typename Element>
__host__ __device__ constexpr int64_t chunks_of_row(const Size& size) {
  return (size.columns + kChunk<Element> - 1) / kChunk<Element>;
}

template <typename Element, int kRows>
__device__ __forceinline__ Place place_of_thread(const Size& size) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kChunkThreads + threadIdx.x;
  const int64_t chunks = chunks_of_row<Element>(size), group = quotient(index, chunks, size.narrow);
  const int64_t row = group * kRows, left = size.rows - row;
  const int count = left < kRows ? static_cast<int>(left) : kRows;
  return {row, (index - group * chunks) * kChunk<Element>, left <= 0 ? 0 : count};
}

template <typename Element, int kRows>
Grid grid_of(const Size& size) {
  const int64_t threads = (size.rows + kRows - 1) / kRows * chunks_of_row<Element>(size);
  return {.x = (threads + kChunkThreads - 1) / kChunkThreads, .threads = kChunkThreads};
}

template <typename Element, int kRows>
__device__ __forceinline__ void load_rows(
    const RowsView& from, const Place& place, int64_t columns, Chunk<Element> (&chunks)[kRows]) {
  using Bits = typename Chunk<Element>::Bits;
  const bool whole = from.vectors && place.column + kChunk<Element> <= columns;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    chunks[i] = {};
    if (i >= place.count) continue;
    const Bits* row = static_cast<const Bits*>(from.data) + (place.row + i) * from.row_stride;
    if (whole) {
      const uint4 four = *reinterpret_cast<const uint4*>(row + place.column);
      chunks[i] = {{four.x, four.y, four.z, four.w}};
      continue;
    }
#pragma unroll
    for (int c = 0; c < kChunk<Element>; ++c) {
      const bool inside = place.column + c < columns;
      chunks[i].set_bits(c, inside ? row[(place.column + c) * from.column_stride] : 0);
    }
  }
}

template <typename Element>
__device__ __forceinline__ void store_row(
    const RowsView& to, int64_t row, int64_t column, int64_t columns, const Chunk<Element>& chunk) {
  const int64_t first = row * to.row_stride + column;
  if (to.vectors && column + kChunk<Element> <= columns) {
    const uint32_t (&words)[4] = chunk.words;
    // Counted in chunks: of a pointer to elements nvcc does not believe that it is aligned, and stores four times.
    static_cast<uint4*>(to.data)[first / kChunk<Element>] = make_uint4(words[0], words[1], words[2], words[3]);
    return;
  }
  auto* elements = static_cast<typename Chunk<Element>::Bits*>(to.data) + first;
#pragma unroll
  for (int c = 0; c < kChunk<Element>; ++c) {
    if (column + c < columns) elements[c] = chunk.bits(c);
  }
}

}  // namespace peft_kernels
