// Informativeness of the blocks of keys, from q [B, heads, T, D] and k, without the [T, T] matrix. Formulas in
// peft_kernels/reference/token_selection.py.
//
// FLOP: B heads D T^2 for the tiles on and below the diagonal, 1.1 TFLOP at T = 16384 and 32 heads of 128; float makes
// three tf32 products of that. Bytes: for each tile 64 rows of q and of k for all heads, 128 heads D e, which come from
// L2: 32 FLOP per byte in 16 bits, so that L2 bounds it, 34 GB or some 6 ms at that size and 5.5 TB/s [calculated].
// Scratch: 4 bytes for each tile of queries and block of keys where tiles are made of whole blocks, B T^2 / (16 block
// size) bytes; else for each pair of a block of queries and one of keys, of which blocks of 17 tokens make most.
//
// A block of threads has 64 queries and 64 keys. The main loop goes through the heads as if they were one depth, and
// between two of them what it has summed is added, its positive part, to a second set of sums; so two heads never wait
// for each other. What a pair of blocks has of these as its maximum is found on the bits of floats that are not
// negative. A tile of whole blocks has its own pairs: it finds their maxima in shared memory and adds its blocks of
// queries. Tiles that share blocks, long ones and those that would leave much of a tile empty, meet by atomics, whose
// order does not show. What is left to add is added afterwards, in the order of the queries.
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
  __device__ __forceinline__
  HeadsLoader(const HeadsView& view, int64_t batch_offset, int64_t first_row, int steps, int thread)
      : view_(view),
        batch_offset_(batch_offset),
        row_(thread / Tile::kChunks),
        chunk_(thread % Tile::kChunks),
        first_row_(first_row),
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
      const HeadsView& view, int64_t batch_offset, int64_t first_row, int steps, int thread, SumsOfHeads& sums,
      SumsOfHeads& positive)
      : HeadsLoader<Element>(view, batch_offset, first_row, steps, thread), sums_(sums), positive_(positive) {}

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
  uint32_t* partial;  // bits of float [blocks of queries or tiles of whole ones, B, blocks of keys], zeros before
  int64_t sequences, block_size, key_blocks;
  int heads, steps;  // of a head
  int blocks;        // how many whole ones a tile has; 0: tiles share blocks
  int side;          // queries, and keys, from one tile to the next
};

constexpr int kScoreStride = kSide + 8;  // so that a warp writes its pairs to different banks
static_assert(kSide * kScoreStride * sizeof(float) <= ScoreShape<float>::kStages * 2 * ScoreTile<float>::kBytes);

// What becomes of a tile of scores [kSide, kScoreStride], which is overwritten. A thread looks at one key, a warp at 32
// neighbors, and the queries that it looks at are those of its warp.
class ScoreReduction {
 public:
  __device__ __forceinline__
  ScoreReduction(const ScoresArguments& a, float* scores, int64_t first_query, int64_t first_key, int thread)
      : a_(a),
        scores_(scores),
        first_query_(first_query),
        first_key_(first_key),
        key_(first_key + thread % kSide),
        thread_(thread),
        column_(thread % kSide),
        part_(thread / kSide) {}

  // Of tiles of whole blocks: over the blocks of queries, in order, the sum of each one's maximum with a block of keys.
  __device__ __forceinline__ void add_blocks() {
    const int size = static_cast<int>(a_.block_size);
    for (int block = part_; block < a_.blocks; block += kParts) {
      scores_[block * size * kScoreStride + column_] = __uint_as_float(largest_of(block * size, (block + 1) * size));
    }
    __syncthreads();
    const int64_t key_block = int64_t{blockIdx.x} * a_.blocks + thread_;
    if (thread_ >= a_.blocks || key_block >= a_.key_blocks) return;
    float sum = 0.0f;
    for (int block = 0; block < a_.blocks; ++block) {
      const float* row = scores_ + block * size * kScoreStride + thread_ * size;
      uint32_t largest = 0;
      for (int column = 0; column < size; ++column) largest = max(largest, __float_as_uint(row[column]));
      sum += __uint_as_float(largest);
    }
    *partial(blockIdx.y, key_block) = __float_as_uint(sum);
  }

  // Of tiles that share blocks: into the maximum of each pair of blocks.
  __device__ __forceinline__ void meet() {
    constexpr int kRows = kSide / kParts;
    const bool one_key_block = first_key_ / a_.block_size == (first_key_ + kSide - 1) / a_.block_size;
    for (int row = part_ * kRows, end = row + kRows; row < end;) {
      const int64_t block = (first_query_ + row) / a_.block_size;
      const int next = static_cast<int>(min(int64_t{end}, (block + 1) * a_.block_size - first_query_));
      uint32_t largest = largest_of(row, next);
      if (one_key_block) largest = __reduce_max_sync(~0u, largest);
      if (largest > 0 && (!one_key_block || thread_ % kLanes == 0)) {
        atomicMax(partial(block, key_ / a_.block_size), largest);
      }
      row = next;
    }
  }

 private:
  static constexpr int kParts = ScoreShape<float>::kThreads / kSide;

  // Of these rows of the tile, in bits, whose order is that of the scores, with NaN above all; 0 where none counts.
  __device__ __forceinline__ uint32_t largest_of(int row, int end) const {
    uint32_t largest = 0;
    if (key_ >= a_.key_blocks * a_.block_size) return largest;
    for (; row < end && first_query_ + row < a_.q.tokens; ++row) {
      const int64_t query = first_query_ + row;
      const int64_t start =
          a_.starts == nullptr ? 0 : a_.starts[blockIdx.z * a_.starts_batch_stride + query * a_.starts_stride];
      const uint32_t bits = __float_as_uint(scores_[row * kScoreStride + column_]) & 0x7FFFFFFFu;
      if (key_ >= start && key_ <= query) largest = max(largest, bits);
    }
    return largest;
  }
  __device__ __forceinline__ uint32_t* partial(int64_t row, int64_t key_block) const {
    return a_.partial + (row * a_.sequences + blockIdx.z) * a_.key_blocks + key_block;
  }

  const ScoresArguments& a_;
  float* const scores_;
  const int64_t first_query_, first_key_, key_;
  const int thread_, column_, part_;
};

// Grid: tiles of keys, of queries, sequences.
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
  const int64_t first_query = int64_t{blockIdx.y} * a.side, first_key = int64_t{blockIdx.x} * a.side;
  auto* shared = dynamic_shared_memory<unsigned char>();
  Left left(a.q, batch * a.q_batch_stride, first_query, a.steps, thread, sums, positive);
  Right right(a.k, batch * a.k_batch_stride, first_key, a.steps, thread);
  Loop loop(left, right, a.heads * a.steps, shared);
  loop.start();
  loop.run(thread, sums);
  add_positive(positive, sums);

  __syncthreads();  // the stages are free
  auto* scores = reinterpret_cast<float*>(shared);
  positive.for_each_pair(thread, [&](int row, int column, float& first, float& second) {
    *reinterpret_cast<float2*>(scores + row * kScoreStride + column) = make_float2(first, second);
  });
  __syncthreads();
  ScoreReduction reduction(a, scores, first_query, first_key, thread);
  if (a.blocks > 0) {
    reduction.add_blocks();
  } else {
    reduction.meet();
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
  ScoresArguments a = {};
  a.side = kSide;
  // Whole blocks leave the rest of a tile empty: none for those that divide it, little for short ones.
  if (block_size < kSide && (kSide % block_size == 0 || block_size <= kSide / 4)) {
    a.blocks = static_cast<int>(kSide / block_size);
    a.side = static_cast<int>(a.blocks * block_size);
  }
  const int64_t tiles = (tokens + a.side - 1) / a.side, query_blocks = (tokens + block_size - 1) / block_size;
  const Tensor partial =
      torch::stable::new_zeros(q, {a.blocks > 0 ? tiles : query_blocks, sequences, key_blocks}, ScalarType::Float);
  a.q = heads_view(q, 1);
  a.k = heads_view(k, q.size(1) / k.size(1));
  a.q_batch_stride = q.stride(0);
  a.k_batch_stride = k.stride(0);
  if (starts.has_value()) {
    a.starts = static_cast<const int32_t*>(starts->const_data_ptr());
    a.starts_batch_stride = starts->stride(0);
    a.starts_stride = starts->stride(1);
  }
  a.partial = static_cast<uint32_t*>(partial.mutable_data_ptr());
  a.sequences = sequences;
  a.block_size = block_size;
  a.key_blocks = key_blocks;
  a.heads = static_cast<int>(q.size(1));
  with_element_type(dtype_of(q.scalar_type()), [&](auto element) {
    using Element = decltype(element);
    using Shape = ScoreShape<Element>;
    constexpr int kDepth = ScoreTile<Element>::kDepth;
    a.steps = (a.q.width + kDepth - 1) / kDepth;
    const Grid grid = {
        .x = (key_blocks * block_size + a.side - 1) / a.side,
        .y = tiles,
        .z = sequences,
        .threads = Shape::kThreads,
        .dynamic_shared_bytes = Shape::kStages * 2 * ScoreTile<Element>::kBytes};
    launch(
        op, grid, block_scores_kernel<Element>, a,
        {{"q", q}, {"k", k}, {"starts", starts.has_value() ? *starts : q}, {"partial", partial, Access::write}});
  });
  add_partial_sums(op, partial, scores);
  return scores;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) { m.impl("block_scores", TORCH_BOX(&peft_kernels::block_scores)); }
