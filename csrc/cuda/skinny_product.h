// A product that reads an activation once for the few columns of the rank: out [outer of x, r] = scale (D * x) small^T.
//
// x is copied as it is, dropped on arrival; `small`, of r rows, is cast from any type. A rank above 64 reads x once per
// 64. Such a product has few blocks and a long depth, so the depth is cut over blocks, which then write partial sums,
// [splits, outer of x, r] in float32. FLOP: 2 per element of x and rank, which the tensor cores do well within the time
// of the reads; float32 takes three tf32 products.
#pragma once

#include <type_traits>

#include <launch.cuh>
#include <shared_memory.h>
#include <torch/csrc/stable/ops.h>

#include "epilogues.h"
#include "lora_kernels.h"
#include "main_loop.h"
#include "partial_sums.h"
#include "views.h"

namespace peft_kernels {

struct SkinnyArguments {
  OperandView x, small;
  DropoutView dropout;
  ResultView out;  // [outer of x, r], once per split
  float scale;
  int steps, steps_per_split;
};

// A block takes kOuter of x by kRank, four warps one below the other, in steps of kDepth_.
template <typename Element, Along along, int kOuter, int kRank, int kDepth_>
struct SkinnyProduct {
  static constexpr int kDepth = kDepth_;
  using Shape = BlockShape<Element, kOuter, kRank, 4, 1, 4>;
  using XTile = Tile<Element, along, kOuter, kDepth>;
  using SmallTile = Tile<Element, Along::depth, kRank, kDepth>;
  using XLoader = DroppingLoader<XTile, Shape::kThreads>;
  using SmallLoader = CastLoader<SmallTile, Shape::kThreads>;
  using Loop = MainLoop<Shape, XTile, SmallTile, XLoader, SmallLoader>;
};

constexpr int kSkinnyThreads = 4 * kLanes;

// The body of a kernel. Grid: blocks of x's outer, splits of the depth, blocks of the rank.
template <typename Product>
__device__ __forceinline__ void multiply_skinny(const SkinnyArguments& a) {
  using Shape = typename Product::Shape;
  const int thread = static_cast<int>(threadIdx.x);
  const auto block = static_cast<int>(blockIdx.x), rank_block = static_cast<int>(blockIdx.z);
  const int first_step = static_cast<int>(blockIdx.y) * a.steps_per_split, steps_left = a.steps - first_step;
  typename Product::XLoader x(a.x, a.dropout, block, first_step, thread);
  typename Product::SmallLoader small(a.small, rank_block, first_step, thread);
  typename Product::Loop loop(
      x, small, steps_left < a.steps_per_split ? steps_left : a.steps_per_split,
      dynamic_shared_memory<unsigned char>());
  Sums<Shape> sums;
  sums.clear();
  loop.start();
  loop.run(thread, sums);
  ResultView out = a.out;  // of this split; more than one are float
  if (gridDim.y > 1) out.data = static_cast<float*>(out.data) + blockIdx.y * out.rows * out.columns;
  store_scaled(out, int64_t{block} * Shape::kM, int64_t{rank_block} * Shape::kN, a.scale, thread, sums);
}

// An operand by its matrix and the dimension that is its outer one.
struct SkinnyOperand {
  const char* name;
  const Tensor& matrix;
  int outer;
};

// Starts `kernel`, whose body is multiply_skinny<Product>. out is contiguous, [outer of x, r] or, `rank_first`, its
// transpose.
template <typename Product>
void start_skinny(
    const char* operation, void (*kernel)(SkinnyArguments), const Tensor& out, bool rank_first, const SkinnyOperand& x,
    const SkinnyOperand& small, double scaling, const Dropout& dropout) {
  using Shape = typename Product::Shape;
  SkinnyArguments a = {};
  a.x = operand_view(x.matrix, x.outer, Product::XTile::along);
  a.small = operand_view(small.matrix, small.outer, Along::depth);
  a.dropout = dropout_view(dropout);
  a.scale = static_cast<float>(scaling * dropout.scale);
  a.steps = static_cast<int>((a.x.depth + Product::kDepth - 1) / Product::kDepth);
  const int64_t rows = a.x.outer, rank = a.small.outer;
  const int64_t blocks = (rows + Shape::kM - 1) / Shape::kM, rank_blocks = (rank + Shape::kN - 1) / Shape::kN;
  const Splits splits = split_steps(a.steps, blocks * rank_blocks);
  a.steps_per_split = splits.steps_per_split;
  const Tensor sums = splits.count == 1
                          ? out
                          : torch::stable::new_empty(out, {splits.count, out.size(0), out.size(1)}, ScalarType::Float);
  a.out = {sums.mutable_data_ptr(),     rows, rank, rank_first ? 1 : rank, rank_first ? rows : 1,
           dtype_of(sums.scalar_type())};
  const Grid grid = {blocks, splits.count, rank_blocks, Shape::kThreads, Product::Loop::kSharedBytes};
  launch(
      operation, grid, kernel, a,
      {{x.name, x.matrix},
       {small.name, small.matrix},
       {"rng_state", rng_operand(dropout, x.matrix)},
       {"out", sums, Access::write}});
  if (splits.count > 1) add_partial_sums(operation, sums, out);
}

// Calls `function` with the block of the rank as a constant.
template <typename Function>
void with_rank_block(int64_t rank, const Function& function) {
  if (rank <= 16) return function(std::integral_constant<int, 16>());
  if (rank <= 32) return function(std::integral_constant<int, 32>());
  return function(std::integral_constant<int, 64>());
}

}  // namespace peft_kernels
