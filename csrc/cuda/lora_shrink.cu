// hidden [M, r] = scale (D * x [M, C]) factor [r, C]^T: the product that reads all of x for a few columns.
//
// Bytes: x once, M C elements; the factor per block of 64 rows, from L2. FLOP: 2 M C r, which the tensor cores do well
// within the time of the reads up to r = 64; float32 takes three tf32 products. A rank above 64 reads x once per 64.
// Blocks beside each other along C write partial sums, [splits, M, r] float32.
#include <cuda_runtime.h>
#include <launch.cuh>
#include <shared_memory.h>
#include <torch/csrc/stable/ops.h>

#include "epilogues.h"
#include "lora_kernels.h"
#include "main_loop.h"
#include "partial_sums.h"
#include "views.h"

namespace peft_kernels {
namespace {

constexpr int kRows = 64, kWarps = 4, kStages = 4;

struct ShrinkArguments {
  OperandView x;       // outer m, depth c
  OperandView factor;  // outer j, depth c
  DropoutView dropout;
  ResultView out;  // [M, r], float, once per split
  float scale;
  int steps, steps_per_split;
};

template <typename Element, int kRank>
struct Shrink {
  static constexpr int kDepth = 128 / sizeof(Element);
  using Shape = BlockShape<Element, kRows, kRank, kWarps, 1, kStages>;
  using XTile = Tile<Element, Along::depth, kRows, kDepth>;
  using FactorTile = Tile<Element, Along::depth, kRank, kDepth>;
  using XLoader = DroppingLoader<XTile, Shape::kThreads>;
  using FactorLoader = CastLoader<FactorTile, Shape::kThreads>;
  using Loop = MainLoop<Shape, XTile, FactorTile, XLoader, FactorLoader>;
};

// Grid: blocks of rows, splits of the depth, blocks of the rank.
template <typename Element, int kRank>
__global__ void __launch_bounds__(kLanes* kWarps) shrink_kernel(const __grid_constant__ ShrinkArguments a) {
  using K = Shrink<Element, kRank>;
  const int thread = static_cast<int>(threadIdx.x);
  const auto block = static_cast<int>(blockIdx.x), rank_block = static_cast<int>(blockIdx.z);
  const int first_step = static_cast<int>(blockIdx.y) * a.steps_per_split, steps_left = a.steps - first_step;
  typename K::XLoader x(a.x, a.dropout, block, first_step, thread);
  typename K::FactorLoader factor(a.factor, rank_block, first_step, thread);
  typename K::Loop loop(
      x, factor, steps_left < a.steps_per_split ? steps_left : a.steps_per_split,
      dynamic_shared_memory<unsigned char>());
  Sums<typename K::Shape> sums;
  sums.clear();
  loop.start();
  loop.run(thread, sums);
  ResultView out = a.out;  // of this split
  out.data = static_cast<float*>(out.data) + blockIdx.y * out.rows * out.columns;
  store_scaled(out, int64_t{block} * kRows, int64_t{rank_block} * kRank, a.scale, thread, sums);
}

template <typename Element, int kRank>
void start(
    const char* operation, const Tensor& out, const Tensor& x, const Tensor& factor, double scaling,
    const Dropout& dropout) {
  using K = Shrink<Element, kRank>;
  ShrinkArguments a = {};
  a.x = operand_view(x, 0, Along::depth);
  a.factor = operand_view(factor, 0, Along::depth);
  a.dropout = dropout_view(dropout);
  a.scale = static_cast<float>(scaling * dropout.scale);
  a.steps = static_cast<int>((a.x.depth + K::kDepth - 1) / K::kDepth);
  const int64_t row_blocks = (a.x.outer + kRows - 1) / kRows, rank_blocks = (a.factor.outer + kRank - 1) / kRank;
  const Splits splits = split_steps(a.steps, row_blocks * rank_blocks);
  a.steps_per_split = splits.steps_per_split;
  const Tensor sums =
      splits.count == 1 ? out : torch::stable::new_empty(out, {splits.count, a.x.outer, a.factor.outer});
  a.out = {sums.mutable_data_ptr(), a.x.outer, a.factor.outer, a.factor.outer, 1, DType::float32};
  const Grid grid = {row_blocks, splits.count, rank_blocks, K::Shape::kThreads, K::Loop::kSharedBytes};
  launch(
      operation, grid, shrink_kernel<Element, kRank>, a,
      {{"x", x}, {"factor", factor}, {"rng_state", rng_operand(dropout, x)}, {"hidden", sums, Access::write}});
  if (splits.count > 1) add_partial_sums(operation, sums, out);
}

}  // namespace

void start_shrink(
    const char* operation, const Tensor& out, const Tensor& x, const Tensor& factor, double scaling,
    const Dropout& dropout) {
  if (out.numel() == 0) return;
  with_element_type(dtype_of(x.scalar_type()), [&](auto element) {
    using Element = decltype(element);
    const int64_t rank = factor.size(0);
    const auto run = rank <= 16 ? start<Element, 16> : rank <= 32 ? start<Element, 32> : start<Element, 64>;
    run(operation, out, x, factor, scaling, dropout);
  });
}

}  // namespace peft_kernels
