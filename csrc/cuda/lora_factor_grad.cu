// grad [C, r] = scale (D * x [M, C])^T hidden [M, r], stored so or as its transpose: a product summed over the tokens.
//
// Bytes: x once, M C elements, whole rows of a tile at a time; hidden per block of columns, from L2. FLOP: 2 M C r as
// in lora_shrink.cu. Blocks beside each other along M write partial sums, [splits, ...] float32.
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

constexpr int kDepth = 32, kWarps = 4, kStages = 4;

struct FactorGradArguments {
  OperandView x;       // outer c, depth m
  OperandView hidden;  // outer j, depth m
  DropoutView dropout;
  ResultView out;  // [C, r], once per split
  float scale;
  int steps, steps_per_split;
};

template <typename Element, int kRank>
struct FactorGrad {
  static constexpr int kColumns = 256 / sizeof(Element);
  using Shape = BlockShape<Element, kColumns, kRank, kWarps, 1, kStages>;
  using XTile = Tile<Element, Along::outer, kColumns, kDepth>;
  using HiddenTile = Tile<Element, Along::depth, kRank, kDepth>;
  using XLoader = DroppingLoader<XTile, Shape::kThreads>;
  using HiddenLoader = CastLoader<HiddenTile, Shape::kThreads>;
  using Loop = MainLoop<Shape, XTile, HiddenTile, XLoader, HiddenLoader>;
};

// Grid: blocks of columns, splits of the tokens, blocks of the rank.
template <typename Element, int kRank>
__global__ void __launch_bounds__(kLanes* kWarps) factor_grad_kernel(const __grid_constant__ FactorGradArguments a) {
  using K = FactorGrad<Element, kRank>;
  const int thread = static_cast<int>(threadIdx.x);
  const auto block = static_cast<int>(blockIdx.x), rank_block = static_cast<int>(blockIdx.z);
  const int first_step = static_cast<int>(blockIdx.y) * a.steps_per_split, steps_left = a.steps - first_step;
  typename K::XLoader x(a.x, a.dropout, block, first_step, thread);
  typename K::HiddenLoader hidden(a.hidden, rank_block, first_step, thread);
  typename K::Loop loop(
      x, hidden, steps_left < a.steps_per_split ? steps_left : a.steps_per_split,
      dynamic_shared_memory<unsigned char>());
  Sums<typename K::Shape> sums;
  sums.clear();
  loop.start();
  loop.run(thread, sums);
  ResultView out = a.out;  // of this split; more than one are float
  if (gridDim.y > 1) out.data = static_cast<float*>(out.data) + blockIdx.y * out.rows * out.columns;
  store_scaled(out, int64_t{block} * K::kColumns, int64_t{rank_block} * kRank, a.scale, thread, sums);
}

template <typename Element, int kRank>
void start(
    const char* operation, const Tensor& out, const Tensor& x, const Tensor& hidden, double scaling,
    const Dropout& dropout, bool transposed) {
  using K = FactorGrad<Element, kRank>;
  FactorGradArguments a = {};
  a.x = operand_view(x, 1, Along::outer);
  a.hidden = operand_view(hidden, 1, Along::depth);
  a.dropout = dropout_view(dropout);
  a.scale = static_cast<float>(scaling * dropout.scale);
  a.steps = static_cast<int>((a.x.depth + kDepth - 1) / kDepth);
  const int64_t column_blocks = (a.x.outer + K::kColumns - 1) / K::kColumns;
  const int64_t rank_blocks = (a.hidden.outer + kRank - 1) / kRank;
  const Splits splits = split_steps(a.steps, column_blocks * rank_blocks);
  a.steps_per_split = splits.steps_per_split;
  const Tensor sums = splits.count == 1
                          ? out
                          : torch::stable::new_empty(out, {splits.count, out.size(0), out.size(1)}, ScalarType::Float);
  const int64_t columns = a.x.outer, rank = a.hidden.outer;
  a.out = {sums.mutable_data_ptr(),     columns, rank, transposed ? rank : 1, transposed ? 1 : columns,
           dtype_of(sums.scalar_type())};
  const Grid grid = {column_blocks, splits.count, rank_blocks, K::Shape::kThreads, K::Loop::kSharedBytes};
  launch(
      operation, grid, factor_grad_kernel<Element, kRank>, a,
      {{"x", x}, {"hidden", hidden}, {"rng_state", rng_operand(dropout, x)}, {"grad", sums, Access::write}});
  if (splits.count > 1) add_partial_sums(operation, sums, out);
}

}  // namespace

void start_factor_grad(
    const char* operation, const Tensor& out, const Tensor& x, const Tensor& hidden, double scaling,
    const Dropout& dropout, bool transposed) {
  if (out.numel() == 0) return;
  with_element_type(dtype_of(x.scalar_type()), [&](auto element) {
    using Element = decltype(element);
    const int64_t rank = hidden.size(1);
    const auto run = rank <= 16 ? start<Element, 16> : rank <= 32 ? start<Element, 32> : start<Element, 64>;
    run(operation, out, x, hidden, scaling, dropout, transposed);
  });
}

}  // namespace peft_kernels
