// Chunks of 16 bytes of rows that are picked one by one, of any strides, to read and to write; and numbers beside them.
// Where 16 bytes cannot be read at once, a loop reads them: unrolled, as in row_chunks.h, the elements of all chunks
// that a thread has under way would take registers at once, more than the norms have.
#pragma once

#include <cstdint>

#include "row_chunks.h"

namespace peft_kernels {

// Moves all elements one place to the front, where the first one leaves, and puts another behind them.
template <typename Element>
__device__ __forceinline__ void push_bits(Chunk<Element>& chunk, uint32_t bits) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t next = i < 3 ? chunk.words[i + 1] : bits;
    chunk.words[i] = sizeof(Element) == 4 ? next : chunk.words[i] >> 16 | next << 16;
  }
}

// Elements from `offset` on, `stride` apart; only `count` of them exist, the others are zero. `vectors`: they can be
// read, or written, at once where all exist.
template <typename Element>
__device__ __forceinline__ Chunk<Element> load_run(
    const void* data, int64_t offset, int64_t stride, int64_t count, bool vectors) {
  using Bits = typename Chunk<Element>::Bits;
  const Bits* from = static_cast<const Bits*>(data) + offset;
  if (vectors && count >= kChunk<Element>) {
    const uint4 four = *reinterpret_cast<const uint4*>(from);
    return {{four.x, four.y, four.z, four.w}};
  }
  Chunk<Element> chunk = {};
#pragma unroll(kChunk<Element> / 2)
  for (int c = 0; c < kChunk<Element>; ++c) push_bits(chunk, c < count ? from[c * stride] : 0);
  return chunk;
}

template <typename Element>
__device__ __forceinline__ void store_run(
    void* data, int64_t offset, int64_t stride, int64_t count, bool vectors, const Chunk<Element>& chunk) {
  if (vectors && count >= kChunk<Element>) {
    const uint32_t (&words)[4] = chunk.words;
    // Counted in chunks, as in store_row().
    static_cast<uint4*>(data)[offset / kChunk<Element>] = make_uint4(words[0], words[1], words[2], words[3]);
    return;
  }
  auto* elements = static_cast<typename Chunk<Element>::Bits*>(data) + offset;
#pragma unroll
  for (int c = 0; c < kChunk<Element>; ++c) {
    if (c < count) elements[c * stride] = chunk.bits(c);
  }
}

// Of a row with `columns` columns; none exist of a row that is to be read as zeros.
template <typename Element>
__device__ __forceinline__ Chunk<Element> load_chunk(
    const RowsView& from, int64_t row, int64_t column, int64_t columns) {
  const int64_t offset = row * from.row_stride + column * from.column_stride;
  return load_run<Element>(from.data, offset, from.column_stride, columns - column, from.vectors);
}

template <typename Element>
__device__ __forceinline__ void store_chunk(
    const RowsView& to, int64_t row, int64_t column, int64_t columns, const Chunk<Element>& chunk) {
  const int64_t offset = row * to.row_stride + column * to.column_stride;
  store_run<Element>(to.data, offset, to.column_stride, columns - column, to.vectors, chunk);
}

// The chunks of the neighboring rows of a thread's place.
template <typename Element, int kRows>
__device__ __forceinline__ void load_chunks(
    const RowsView& from, const Place& place, int64_t columns, Chunk<Element> (&chunks)[kRows]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    chunks[i] = load_chunk<Element>(from, place.row + i, place.column, i < place.count ? columns : 0);
  }
}

// Of numbers in a dtype of their own those beside a chunk, from `first` on, a multiple of four where the stream has
// vectors; only `count` of them exist, the others are zero.
template <typename Element>
__device__ __forceinline__ void load_numbers(
    const Stream& stream, int64_t first, int64_t count, float (&numbers)[kChunk<Element>]) {
#pragma unroll
  for (int begin = 0; begin < kChunk<Element>; begin += kThreadEntries) {
    const int64_t left = count - begin;
    const int there = left <= 0 ? 0 : left < kThreadEntries ? static_cast<int>(left) : kThreadEntries;
    float four[kThreadEntries];
    unpack(load_packed(stream, {first + begin, there}), stream.dtype, four);
#pragma unroll
    for (int i = 0; i < kThreadEntries; ++i) numbers[begin + i] = four[i];
  }
}

}  // namespace peft_kernels
