// How tiles of an operand come from global to shared memory. A block's threads share the work; each tile is brought in
// three moments, which main_loop.h places:
//
//     issue    start the reads, long before they are needed
//     settle   write what came through registers, a step later
//     arrived  touch up what this thread has brought itself, before anyone else reads it
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/philox.h"
#include "dtypes.h"
#include "tile.h"

namespace peft_kernels {

// An operand [outer, depth] in global memory; strides count elements.
struct OperandView {
  const void* data;
  int64_t outer, depth;
  int64_t outer_stride, depth_stride;
  DType dtype;
  bool vectors;  // whether the runs of neighbors can be read 16 bytes at a time
};

struct DropoutView {
  const int64_t* rng_state;  // (seed, offset); null without dropout
  uint32_t threshold;
};

__device__ __forceinline__ int clamped(int64_t value, int most) {
  return value <= 0 ? 0 : value >= most ? most : static_cast<int>(value);
}

// Elements of the tile's own type, 16 bytes at a time by cp.async; one by one where the memory does not allow that.
// What lies outside the operand becomes zero. The block's tiles start at outer_block tiles and go along the depth, step
// by step, from first_step on.
template <typename Tile, int kThreads>
class AsyncLoader {
 public:
  using Element = typename Tile::Element;

  __device__ __forceinline__ AsyncLoader(const OperandView& view, int outer_block, int first_step, int thread)
      : view_(view),
        row_(thread / Tile::kChunks),
        column_(thread % Tile::kChunks * Tile::kChunk),
        outer_block_(outer_block),
        first_step_(first_step) {}

  __device__ __forceinline__ void issue(Element* tile, int step) {
    const int64_t outer = outer_begin(), depth = depth_begin(step);
    const int64_t first_row = along_depth ? outer : depth, first_column = along_depth ? depth : outer;
    const int64_t row_stride = along_depth ? view_.outer_stride : view_.depth_stride;
    const int64_t column_stride = along_depth ? view_.depth_stride : view_.outer_stride;
    const int64_t rows_left = (along_depth ? view_.outer : view_.depth) - first_row;
    const int count = clamped((along_depth ? view_.depth : view_.outer) - first_column - column_, Tile::kChunk);
    const Element* from = static_cast<const Element*>(view_.data) + (first_row + row_) * row_stride +
                          (first_column + column_) * column_stride;
    if (view_.vectors) {
#pragma unroll
      for (int i = 0; i < kShare; ++i, from += kRowStep * row_stride) {
        const int there = row_ + i * kRowStep < rows_left ? count * static_cast<int>(sizeof(Element)) : 0;
        copy_async_16(tile + place_of(i), there > 0 ? from : view_.data, there);
      }
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kShare; ++i, from += kRowStep * row_stride) {
      const int there = row_ + i * kRowStep < rows_left ? count : 0;
      Element* to = tile + place_of(i);
#pragma unroll 1
      for (int c = 0; c < Tile::kChunk; ++c) to[c] = c < there ? from[c * column_stride] : Element(0.0f);
    }
  }
  __device__ __forceinline__ void settle(Element*) {}
  __device__ __forceinline__ void arrived(Element*, int) {}

 protected:
  static constexpr bool along_depth = Tile::along == Along::depth;
  static constexpr int kShare = Tile::kRows * Tile::kChunks / kThreads;  // chunks of one thread
  static constexpr int kRowStep = kThreads / Tile::kChunks;              // rows from one to the next
  static_assert(kThreads % Tile::kChunks == 0 && Tile::kRows % kRowStep == 0);

  __device__ __forceinline__ int64_t outer_begin() const { return int64_t{outer_block_} * Tile::kOuter; }
  __device__ __forceinline__ int64_t depth_begin(int step) const { return int64_t{first_step_ + step} * Tile::kDepth; }

  // Where the thread's chunk i lies in the tile.
  __device__ __forceinline__ int place_of(int i) const {
    return Tile::chunk_offset(row_ + i * kRowStep, column_ / Tile::kChunk);
  }

  const OperandView& view_;
  const int row_, column_;  // of the thread's first chunk
  const int outer_block_, first_step_;
};

// The same with the rows of the tile picked from the operand by a list: row i of the block is operand row indices[i].
// The operand lies along the depth; `view.outer` counts the list.
template <typename Tile, int kThreads>
class GatheringLoader : public AsyncLoader<Tile, kThreads> {
  using Base = AsyncLoader<Tile, kThreads>;
  using typename Base::Element;
  static_assert(Base::along_depth);

 public:
  __device__ __forceinline__
  GatheringLoader(const OperandView& view, const int64_t* indices, int outer_block, int first_step, int thread)
      : Base(view, outer_block, first_step, thread) {
#pragma unroll
    for (int i = 0; i < Base::kShare; ++i) {
      const int64_t place = this->outer_begin() + this->row_ + i * Base::kRowStep;
      rows_[i] = place < view.outer ? indices[place] : kNone;
    }
  }

  __device__ __forceinline__ void issue(Element* tile, int step) {
    const OperandView& view = this->view_;
    const int64_t column = this->depth_begin(step) + this->column_;
    const int count = clamped(view.depth - column, Tile::kChunk);
#pragma unroll
    for (int i = 0; i < Base::kShare; ++i) {
      const int there = rows_[i] == kNone ? 0 : count;
      const Element* from =
          static_cast<const Element*>(view.data) + rows_[i] * view.outer_stride + column * view.depth_stride;
      Element* to = tile + this->place_of(i);
      if (view.vectors) {
        copy_async_16(to, there > 0 ? from : view.data, there * static_cast<int>(sizeof(Element)));
      } else {
#pragma unroll 1
        for (int c = 0; c < Tile::kChunk; ++c) to[c] = c < there ? from[c * view.depth_stride] : Element(0.0f);
      }
    }
  }

 private:
  static constexpr int64_t kNone = -1;
  int64_t rows_[Base::kShare];
};

// The same with dropped elements set to zero on arrival, by the thread that brought them. The operand is stored row by
// row of the mask: row m and column c of the tile's memory are row m and column c of D.
template <typename Tile, int kThreads>
class DroppingLoader : public AsyncLoader<Tile, kThreads> {
  using Base = AsyncLoader<Tile, kThreads>;
  using typename Base::Element;

 public:
  __device__ __forceinline__
  DroppingLoader(const OperandView& view, const DropoutView& dropout, int outer_block, int first_step, int thread)
      : Base(view, outer_block, first_step, thread), dropout_(dropout) {}

  __device__ __forceinline__ void arrived(Element* tile, int step) {
    if (dropout_.rng_state == nullptr) return;
    const RngState state = {dropout_.rng_state[0], dropout_.rng_state[1]};
    const int64_t outer = this->outer_begin(), depth = this->depth_begin(step);
    const int64_t m = (Base::along_depth ? outer : depth) + this->row_;
    const int64_t c = (Base::along_depth ? depth : outer) + this->column_;
#pragma unroll 1  // a generator at a time: more would cost the registers of another block
    for (int i = 0; i < Base::kShare; ++i) {
      uint32_t words[4];
      philox_4x32_10(
          state, static_cast<uint32_t>(c / kPhiloxGroup), static_cast<uint32_t>(m + i * Base::kRowStep), words);
      // A chunk is a whole group of the mask, or half of one in float.
      auto* chunk = reinterpret_cast<uint4*>(tile + this->place_of(i));
      uint4 bits = *chunk;
      if constexpr (Tile::kChunk == kPhiloxGroup) {
        bits.x &= kept_pair(words[0]);
        bits.y &= kept_pair(words[1]);
        bits.z &= kept_pair(words[2]);
        bits.w &= kept_pair(words[3]);
      } else {
        const bool upper = c % kPhiloxGroup != 0;
        const uint32_t first = kept_pair(upper ? words[2] : words[0]), second = kept_pair(upper ? words[3] : words[1]);
        bits.x &= low_half_twice(first);
        bits.y &= high_half_twice(first);
        bits.z &= low_half_twice(second);
        bits.w &= high_half_twice(second);
      }
      *chunk = bits;
    }
  }

 private:
  // Ones over the 16-bit halves of a word whose draws keep their elements.
  __device__ __forceinline__ uint32_t kept_pair(uint32_t word) const {
    const uint32_t low = (word & 0xFFFFu) >= dropout_.threshold ? 0xFFFFu : 0u;
    const uint32_t high = (word >> 16) >= dropout_.threshold ? 0xFFFF0000u : 0u;
    return low | high;
  }
  static __device__ __forceinline__ uint32_t low_half_twice(uint32_t word) { return (word & 0xFFFFu) * 0x10001u; }
  static __device__ __forceinline__ uint32_t high_half_twice(uint32_t word) { return (word >> 16) * 0x10001u; }

  const DropoutView& dropout_;
};

// Elements of any type and strides, cast on the way: the operands of rank r, which are small. Neighboring threads read
// along the smaller stride; a thread's elements lie one below the other along the other one.
template <typename Tile, int kThreads>
class CastLoader {
 public:
  using Element = typename Tile::Element;

  __device__ __forceinline__ CastLoader(const OperandView& view, int outer_block, int first_step, int thread)
      : view_(view),
        depth_first_(view.depth_stride <= view.outer_stride),
        outer_(depth_first_ ? thread / Tile::kDepth : thread % Tile::kOuter),
        depth_(depth_first_ ? thread % Tile::kDepth : thread / Tile::kOuter),
        outer_block_(outer_block),
        first_step_(first_step) {}

  __device__ __forceinline__ void issue(Element*, int step) {
    switch (view_.dtype) {
      case DType::float32:
        return fetch<float>(step);
      case DType::bfloat16:
        return fetch<BFloat16>(step);
      case DType::float16:
        return fetch<Half>(step);
    }
  }
  __device__ __forceinline__ void settle(Element* tile) {
    switch (view_.dtype) {
      case DType::float32:
        return write<float>(tile);
      case DType::bfloat16:
        return write<BFloat16>(tile);
      case DType::float16:
        return write<Half>(tile);
    }
  }
  __device__ __forceinline__ void arrived(Element*, int) {}

 private:
  static constexpr int kShare = Tile::kOuter * Tile::kDepth / kThreads;  // elements of one thread
  static constexpr int kOuterStep = kThreads / Tile::kDepth, kDepthStep = kThreads / Tile::kOuter;
  static_assert(kThreads % Tile::kDepth == 0 && kThreads % Tile::kOuter == 0);
  static_assert(kShare * kOuterStep == Tile::kOuter && kShare * kDepthStep == Tile::kDepth);

  template <typename Source>
  using Bits = std::conditional_t<sizeof(Source) == 4, uint32_t, uint16_t>;

  template <typename Source>
  __device__ __forceinline__ void fetch(int step) {
    const int64_t outer = int64_t{outer_block_} * Tile::kOuter + outer_;
    const int64_t depth = int64_t{first_step_ + step} * Tile::kDepth + depth_;
    const Source* from =
        static_cast<const Source*>(view_.data) + outer * view_.outer_stride + depth * view_.depth_stride;
    const int64_t stride = depth_first_ ? kOuterStep * view_.outer_stride : kDepthStep * view_.depth_stride;
    // How many of the thread's elements exist.
    const int64_t left = depth_first_ ? view_.outer - outer : view_.depth - depth;
    const bool beside = depth_first_ ? depth < view_.depth : outer < view_.outer;
    const int there = beside ? clamped(left, Tile::kOuter + Tile::kDepth) : 0;
#pragma unroll
    for (int i = 0; i < kShare; ++i, from += stride) {
      const int place = depth_first_ ? i * kOuterStep : i * kDepthStep;
      bits_[i] = place < there ? *reinterpret_cast<const Bits<Source>*>(from) : 0;
    }
  }

  // Cast here and not where they are read: that would wait for the memory.
  template <typename Source>
  __device__ __forceinline__ void write(Element* tile) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int outer = depth_first_ ? outer_ + i * kOuterStep : outer_;
      const int depth = depth_first_ ? depth_ : depth_ + i * kDepthStep;
      const auto bits = static_cast<Bits<Source>>(bits_[i]);
      Source value;
      memcpy(&value, &bits, sizeof(value));
      tile[Tile::offset(outer, depth)] = static_cast<Element>(static_cast<float>(value));
    }
  }

  const OperandView& view_;
  const bool depth_first_;
  const int outer_, depth_;  // of the thread's first element
  const int outer_block_, first_step_;
  uint32_t bits_[kShare];  // as read
};

}  // namespace peft_kernels
