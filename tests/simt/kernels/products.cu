// Products on the main loop with the loads and epilogues that the library's kernels do not use: rows picked by a list,
// and the gradient of a slice of columns, split over the tokens.
#include <cuda_runtime.h>
#include <launch.cuh>
#include <shared_memory.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "epilogues.h"
#include "main_loop.h"
#include "partial_sums.h"
#include "views.h"

namespace peft_kernels {
namespace {

constexpr int kDepth = 64, kTokens = 32;

template <typename Element>
using Shape = BlockShape<Element, 64, 64, 2, 2, 3>;

int steps_of(int64_t depth, int step) { return static_cast<int>((depth + step - 1) / step); }

// --- out [rows picked, N] = x [M, K] at those rows, times weight [N, K]^T ---

struct GatheredArguments {
  OperandView x, weight;
  const int64_t* indices;
  DenseView out;
};

template <typename Element>
__global__ void __launch_bounds__(128) gathered_product_kernel(const __grid_constant__ GatheredArguments a) {
  using S = Shape<Element>;
  using Rows = Tile<Element, Along::depth, S::kM, kDepth>;
  using Columns = Tile<Element, Along::depth, S::kN, kDepth>;
  using XLoader = GatheringLoader<Rows, S::kThreads>;
  using WeightLoader = AsyncLoader<Columns, S::kThreads>;
  const int thread = static_cast<int>(threadIdx.x);
  auto* shared = dynamic_shared_memory<unsigned char>();
  XLoader x(a.x, a.indices, static_cast<int>(blockIdx.x), 0, thread);
  WeightLoader weight(a.weight, static_cast<int>(blockIdx.y), 0, thread);
  const int steps = static_cast<int>((a.x.depth + kDepth - 1) / kDepth);
  MainLoop<S, Rows, Columns, XLoader, WeightLoader> loop(x, weight, steps, shared);
  Sums<S> sums;
  sums.clear();
  loop.start();
  loop.run(thread, sums);
  __syncthreads();
  store_dense(a.out, int64_t{blockIdx.x} * S::kM, int64_t{blockIdx.y} * S::kN, thread, shared, sums);
}

Tensor gathered_product(const Tensor& x, const Tensor& indices, const Tensor& weight) {
  Tensor out = torch::stable::new_empty(x, {indices.size(0), weight.size(0)});
  if (out.numel() == 0) return out;
  GatheredArguments a = {};
  a.x = operand_view(x, 0, Along::depth);
  a.x.outer = indices.size(0);
  a.weight = operand_view(weight, 0, Along::depth);
  a.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  a.out = {
      out.mutable_data_ptr(),
      nullptr,
      0,
      out.size(0),
      out.size(1),
      allows_vectors(out.const_data_ptr(), out.size(1), 1, out.element_size())};
  const auto run = [&]<typename Element>(Element) {
    using S = Shape<Element>;
    const Grid grid = {
        .x = (out.size(0) + S::kM - 1) / S::kM,
        .y = (out.size(1) + S::kN - 1) / S::kN,
        .threads = S::kThreads,
        .dynamic_shared_bytes = size_t{S::kStages} * (S::kM + S::kN) * kDepth * sizeof(Element)};
    launch(
        "gathered_product", grid, gathered_product_kernel<Element>, a,
        {{"x", x}, {"indices", indices}, {"weight", weight}, {"out", out, Access::write}});
  };
  x.scalar_type() == ScalarType::BFloat16 ? run(BFloat16()) : run(Half());
  return out;
}

// --- out [N, columns] = dy [M, N]^T x [M, K] at a slice of its columns, float ---

struct SliceArguments {
  OperandView dy, x;
  ResultView out;
  int steps, steps_per_split;
};

template <typename Element>
__global__ void __launch_bounds__(128) slice_gradient_kernel(const __grid_constant__ SliceArguments a) {
  using S = Shape<Element>;
  using Left = Tile<Element, Along::outer, S::kM, kTokens>;
  using Right = Tile<Element, Along::outer, S::kN, kTokens>;
  using DyLoader = AsyncLoader<Left, S::kThreads>;
  using XLoader = AsyncLoader<Right, S::kThreads>;
  const int thread = static_cast<int>(threadIdx.x);
  const auto row_block = static_cast<int>(blockIdx.x), column_block = static_cast<int>(blockIdx.z);
  const int first_step = static_cast<int>(blockIdx.y) * a.steps_per_split, steps_left = a.steps - first_step;
  DyLoader dy(a.dy, row_block, first_step, thread);
  XLoader x(a.x, column_block, first_step, thread);
  MainLoop<S, Left, Right, DyLoader, XLoader> loop(
      dy, x, steps_left < a.steps_per_split ? steps_left : a.steps_per_split, dynamic_shared_memory<unsigned char>());
  Sums<S> sums;
  sums.clear();
  loop.start();
  loop.run(thread, sums);
  ResultView out = a.out;
  out.data = static_cast<float*>(out.data) + blockIdx.y * out.rows * out.columns;
  store_scaled(out, int64_t{row_block} * S::kM, int64_t{column_block} * S::kN, 1.0f, thread, sums);
}

Tensor slice_gradient(const Tensor& dy, const Tensor& x, int64_t first, int64_t columns) {
  const Tensor slice = torch::stable::narrow(const_cast<Tensor&>(x), 1, first, columns);
  Tensor out = torch::stable::new_empty(dy, {dy.size(1), columns}, ScalarType::Float);
  SliceArguments a = {};
  a.dy = operand_view(dy, 1, Along::outer);
  a.x = operand_view(slice, 1, Along::outer);
  a.steps = steps_of(a.x.depth, kTokens);
  with_element_type(dtype_of(dy.scalar_type()), [&](auto element) {
    using Element = decltype(element);
    using S = Shape<Element>;
    const int row_blocks = steps_of(a.dy.outer, S::kM), column_blocks = steps_of(columns, S::kN);
    const Splits splits = split_steps(a.steps, int64_t{row_blocks} * column_blocks);
    a.steps_per_split = splits.steps_per_split;
    Tensor sums = torch::stable::new_empty(out, {splits.count, out.size(0), columns});
    a.out = {sums.mutable_data_ptr(), out.size(0), columns, columns, 1, DType::float32};
    const Grid grid = {
        row_blocks, splits.count, column_blocks, S::kThreads,
        size_t{S::kStages} * (S::kM + S::kN) * kTokens * sizeof(Element)};
    launch(
        "slice_gradient", grid, slice_gradient_kernel<Element>, a,
        {{"dy", dy}, {"x", slice}, {"sums", sums, Access::write}});
    add_partial_sums("slice_gradient", sums, out);
  });
  return out;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels, m) {
  m.def("gathered_product(Tensor x, Tensor indices, Tensor weight) -> Tensor");
  m.def("slice_gradient(Tensor dy, Tensor x, int first, int columns) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("gathered_product", TORCH_BOX(&peft_kernels::gathered_product));
  m.impl("slice_gradient", TORCH_BOX(&peft_kernels::slice_gradient));
}
