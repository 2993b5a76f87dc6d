// Informativeness of the blocks of keys, from q [B, heads, T, D] and k, without the [T, T] matrix. Formulas in
// peft_kernels/reference/token_selection.py.
//
// FLOP: B heads D T^2 for the tiles on and below the diagonal, 1.1 TFLOP at T = 16384 and 32 heads of 128; float makes
// three tf32 products of that. Bytes: for each tile 64 rows of q and of k for all heads, 128 heads D e, which come from
// L2: 32 FLOP per byte in 16 bits, so that L2 bounds it, 34 GB or some 6 ms at that size and 5.5 TB/s [calculated].
// Scratch: 4 bytes for each pair of a block of queries and one of keys.
//
// A block of threads has 64 queries and 64 keys. The main loop goes through the heads as if they were one depth, and
// between two of them what it has summed is added, its positive part, to a second set of sums; so two heads never wait
// for each other. What a pair of blocks has of these as its maximum is found by atomics on the bits of floats that are
// not negative, whose order does not show; blocks of queries are added afterwards, in their order.
#include <cuda_runtime.h>
#include <launch.cuh>
#include <shared_memory.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../common/token_selection_checks.h"
#include "main_loop.h"
#include "partial_sums.h"
#include "slice_entries.h"
#include "views.h"

namespace peft_kernels {
namespace {

constexpr bool kTakesFloat64 = false;
constexpr int kSide = 64;  // queries, and keys, of a block of threads

template <typename Element>
using ScoreShape = BlockShape<Element, kSide, kSide, 2, 2, 3>;
template <typename Element>
using ScoreTile = Tile<Element, Along::depth, kSide, 128 / sizeof(Element)>;

// q or k of one sequence.
struct HeadsView {
  const void* data;
  int64_t head_stride, token_stride, stride;
  int64_t tokens;
  int heads_shared;  // how many heads of q go with one of these
  int width;         // D
  bool vectors;
};

// Tiles of a head after the other, `steps` of each. What lies outside becomes zero.
template <typename Element>
class HeadsLoader {
  using Tile = ScoreTile<Element>;
  static constexpr int kThreads = ScoreShape<Element>::kThreads;
  static constexpr int kRowStep = kThreads / Tile::kChunks, kShare = Tile::kRows / kRowStep;

 public:
  __device__ __forceinline__ HeadsLoader(const HeadsView& view, int64_t batch_offset, int block, int steps, int thread)
      : view_(view),
        batch_offset_(batch_offset),
        row_(thread / Tile::kChunks),
        chunk_(thread % Tile::kChunks),
        first_row_(int64_t{block} * kSide),
        steps_(steps) {}

  __device__ __forceinline__ void issue(Element* tile, int step) {
    const int head = step / steps_, column = (step - head * steps_) * Tile::kDepth + chunk_ * Tile::kChunk;
    const int count = clamped(view_.width - column, Tile::kChunk);
    const Element* from = static_cast<const Element*>(view_.data) + batch_offset_ +
                          head / view_.heads_shared * view_.head_stride + (first_row_ + row_) * view_.token_stride +
                          column * view_.stride;
#pragma unroll
    for (int i = 0; i < kShare; ++i, from += kRowStep * view_.token_stride) {
      const int there = first_row_ + row_ + i * kRowStep < view_.tokens ? count : 0;
      Element* to = tile + Tile::chunk_offset(row_ + i * kRowStep, chunk_);
      if (view_.vectors) {
        copy_async_16(to, there > 0 ? from : view_.data, there * static_cast<int>(sizeof(Element)));
      } else {
#pragma unroll 1
        for (int c = 0; c < Tile::kChunk; ++c) to[c] = c < there ? from[c * view_.stride] : Element(0.0f);
      }
    }
  }
  __device__ __forceinline__ void settle(Element*) {}
  __device__ __forceinline__ void arrived(Element*, int) {}

 protected:
  const HeadsView& view_;
  const int64_t batch_offset_;
  const int row_, chunk_;
  const int64_t first_row_;
  const int steps_;
};

// Adds the positive part of what one head has summed; NaN stays.
template <typename Shape>
__device__ __forceinline__ void add_positive(Sums<Shape>& positive, Sums<Shape>& sums) {
#pragma unroll
  for (int i = 0; i < Shape::kMmaM; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::kMmaN; ++j) {
#pragma unroll
      for (int place = 0; place < 4; ++place) {
        const float value = sums.values[i][j][place];
        positive.values[i][j][place] += value < 0.0f ? 0.0f : value;
        sums.values[i][j][place] = 0.0f;
      }
    }
  }
}

// The loader of the left operand, which the main loop tells when a head begins: the products before are then complete.
template <typename Element>
class FoldingLoader : public HeadsLoader<Element> {
  using SumsOfHeads = Sums<ScoreShape<Element>>;

 public:
  __device__ __forceinline__ FoldingLoader(
      const HeadsView& view, int64_t batch_offset, int block, int steps, int thread, SumsOfHeads& sums,
      SumsOfHeads& positive)
      : HeadsLoader<Element>(view, batch_offset, block, steps, thread), sums_(sums), positive_(positive) {}

  __device__ __forceinline__ void arrived(Element*, int step) {
    if (step > 0 && step % this->steps_ == 0) add_positive(positive_, sums_);
  }

 private:
  SumsOfHeads &sums_, &positive_;
};

struct ScoresArguments {
  HeadsView q, k;
  int64_t q_batch_stride, k_batch_stride;
  const int32_t* starts;  // null: from the first token
  int64_t starts_batch_stride, starts_stride;
  uint32_t* largest;  // [blocks of queries, B, blocks of keys], zeros before
  int64_t sequences, block_size, key_blocks;
  int heads, steps;  // of a head
};

// Grid: blocks of keys, of queries, sequences.
template <typename Element>
__global__ void __launch_bounds__(ScoreShape<Element>::kThreads, 3)
    block_scores_kernel(const __grid_constant__ ScoresArguments a) {
  using Shape = ScoreShape<Element>;
  using Left = FoldingLoader<Element>;
  using Right = HeadsLoader<Element>;
  using Loop = MainLoop<Shape, ScoreTile<Element>, ScoreTile<Element>, Left, Right>;
  if (blockIdx.x > blockIdx.y) return;  // no query sees a key behind it
  const int thread = static_cast<int>(threadIdx.x), batch = static_cast<int>(blockIdx.z);
  Sums<Shape> sums, positive;
  sums.clear();
  positive.clear();
  Left left(a.q, batch * a.q_batch_stride, static_cast<int>(blockIdx.y), a.steps, thread, sums, positive);
  Right right(a.k, batch * a.k_batch_stride, static_cast<int>(blockIdx.x), a.steps, thread);
  Loop loop(left, right, a.heads * a.steps, dynamic_shared_memory<unsigned char>());
  loop.start();
  loop.run(thread, sums);
  add_positive(positive, sums);

  const int64_t first_query = int64_t{blockIdx.y} * kSide, first_key = int64_t{blockIdx.x} * kSide;
  const bool one_pair = first_query / a.block_size == (first_query + kSide - 1) / a.block_size &&
                        first_key / a.block_size == (first_key + kSide - 1) / a.block_size;
  const int64_t last_key = a.key_blocks * a.block_size;
  uint32_t own = 0;  // of a block of threads within one pair
  const auto count = [&](int64_t query, int64_t key, int64_t start, float value) {
    const uint32_t bits = __float_as_uint(value) & 0x7FFFFFFFu;
    if (query >= a.q.tokens || key >= last_key || key > query || key < start || bits == 0) return;
    if (one_pair) {
      own = max(own, bits);
      return;
    }
    const int64_t row = query / a.block_size * a.sequences + batch;
    atomicMax(a.largest + row * a.key_blocks + key / a.block_size, bits);
  };
  positive.for_each_pair(thread, [&](int row, int column, float& first, float& second) {
    const int64_t query = first_query + row, key = first_key + column;
    int64_t start = 0;
    if (a.starts != nullptr && query < a.q.tokens) {
      start = a.starts[batch * a.starts_batch_stride + query * a.starts_stride];
    }
    count(query, key, start, first);
    count(query, key + 1, start, second);
  });
  if (!one_pair) return;
  own = __reduce_max_sync(~0u, own);
  if (thread % kLanes == 0 && own > 0) {
    const int64_t row = first_query / a.block_size * a.sequences + batch;
    atomicMax(a.largest + row * a.key_blocks + first_key / a.block_size, own);
  }
}

HeadsView heads_view(const Tensor& tensor, int64_t heads_shared) {
  const void* data = tensor.const_data_ptr();
  const int64_t bytes = tensor.element_size();
  const bool vectors = allows_vectors(data, tensor.stride(0), tensor.stride(3), bytes) &&
                       allows_vectors(data, tensor.stride(1), tensor.stride(3), bytes) &&
                       allows_vectors(data, tensor.stride(2), tensor.stride(3), bytes);
  return {
      data,
      tensor.stride(1),
      tensor.stride(2),
      tensor.stride(3),
      tensor.size(2),
      static_cast<int>(heads_shared),
      static_cast<int>(tensor.size(3)),
      vectors};
}

Tensor block_scores(const Tensor& q, const Tensor& k, int64_t block_size, std::optional<Tensor> starts) {
  constexpr const char* op = "block_scores";
  check_block_scores(op, q, k, block_size, starts, kTakesFloat64);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const int64_t sequences = q.size(0), tokens = q.size(2), key_blocks = tokens / block_size;
  Tensor scores = torch::stable::new_empty(q, {sequences, key_blocks}, ScalarType::Float);
  if (scores.numel() == 0) return scores;
  const int64_t query_blocks = (tokens + block_size - 1) / block_size;
  const Tensor largest = torch::stable::new_zeros(q, {query_blocks, sequences, key_blocks}, ScalarType::Float);
  ScoresArguments a = {};
  a.q = heads_view(q, 1);
  a.k = heads_view(k, q.size(1) / k.size(1));
  a.q_batch_stride = q.stride(0);
  a.k_batch_stride = k.stride(0);
  if (starts.has_value()) {
    a.starts = static_cast<const int32_t*>(starts->const_data_ptr());
    a.starts_batch_stride = starts->stride(0);
    a.starts_stride = starts->stride(1);
  }
  a.largest = static_cast<uint32_t*>(largest.mutable_data_ptr());
  a.sequences = sequences;
  a.block_size = block_size;
  a.key_blocks = key_blocks;
  a.heads = static_cast<int>(q.size(1));
  with_element_type(dtype_of(q.scalar_type()), [&](auto element) {
    using Element = decltype(element);
    using Shape = ScoreShape<Element>;
    constexpr int kDepth = ScoreTile<Element>::kDepth;
    a.steps = (a.q.width + kDepth - 1) / kDepth;
    const int64_t tiles = (tokens + kSide - 1) / kSide;
    const Grid grid = {
        .x = (key_blocks * block_size + kSide - 1) / kSide,
        .y = tiles,
        .z = sequences,
        .threads = Shape::kThreads,
        .dynamic_shared_bytes = Shape::kStages * 2 * ScoreTile<Element>::kBytes};
    launch(
        op, grid, block_scores_kernel<Element>, a,
        {{"q", q}, {"k", k}, {"starts", starts.has_value() ? *starts : q}, {"largest", largest, Access::write}});
  });
  add_partial_sums(op, largest, scores);
  return scores;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) { m.impl("block_scores", TORCH_BOX(&peft_kernels::block_scores)); }
