// out [M, C_out] = x [M, C_in] matrix [C_in, C_out] + bias + D * (scale hidden [M, r] factor [r, C_out]), bfloat16 and
// float16: forward and dx of the layer.
//
// The product of rank r goes first into the same sums, where it can be scaled and dropped, while the first tiles of the
// large product are on their way; no pass over out is spent on it. FLOP: 2 M C_out (C_in + r), r rounded up to 32.
// Bytes, read from L2 or beyond: 2 (C_in + r) (1/128 + 1/128) per result of a 128 x 128 block, and 2 written.
#include <cuda_runtime.h>
#include <launch.cuh>
#include <shared_memory.h>

#include "block_place.h"
#include "epilogues.h"
#include "lora_kernels.h"
#include "main_loop.h"
#include "views.h"

namespace peft_kernels {
namespace {

constexpr int kDepth = 64, kRankDepth = 32;

struct MatmulArguments {
  OperandView x;       // outer m, depth k
  OperandView matrix;  // outer n, depth k
  OperandView hidden;  // outer m, depth j
  OperandView factor;  // outer n, depth j
  DropoutView dropout;
  DenseView out;  // [M, C_out]
  float scale;
};

// `along` is where the matrix has its neighbors: weight^T along the depth, weight along the columns of the result.
template <typename Shape_, Along along>
struct Matmul {
  using Shape = Shape_;
  using Element = typename Shape::Element;
  using XTile = Tile<Element, Along::depth, Shape::kM, kDepth>;
  using MatrixTile = Tile<Element, along, Shape::kN, kDepth>;
  using XLoader = AsyncLoader<XTile, Shape::kThreads>;
  using MatrixLoader = AsyncLoader<MatrixTile, Shape::kThreads>;
  using Loop = MainLoop<Shape, XTile, MatrixTile, XLoader, MatrixLoader>;
  using HiddenTile = Tile<Element, Along::depth, Shape::kM, kRankDepth>;
  using FactorTile = Tile<Element, Along::depth, Shape::kN, kRankDepth>;
  // What the product of rank r works in, all within one stage.
  static constexpr int kMaskOffset = HiddenTile::kBytes + FactorTile::kBytes;
  static_assert(kMaskOffset + Shape::kM * Shape::kN / kPhiloxGroup <= Loop::kStageBytes);
  static_assert(Shape::kM * Shape::kN * sizeof(Element) <= Loop::kSharedBytes);  // where the result is staged
};

// sums += hidden factor, 32 ranks at a time.
template <typename K>
__device__ __forceinline__ void multiply_low_rank(
    const MatmulArguments& a, const BlockPlace& place, int thread, unsigned char* shared,
    Sums<typename K::Shape>& sums) {
  using Element = typename K::Element;
  auto* hidden_tile = reinterpret_cast<Element*>(shared);
  auto* factor_tile = reinterpret_cast<Element*>(shared + K::HiddenTile::kBytes);
  CastLoader<typename K::HiddenTile, K::Shape::kThreads> hidden(a.hidden, place.row, 0, thread);
  CastLoader<typename K::FactorTile, K::Shape::kThreads> factor(a.factor, place.column, 0, thread);
  const int steps = static_cast<int>((a.hidden.depth + kRankDepth - 1) / kRankDepth);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    hidden.issue(hidden_tile, step);
    factor.issue(factor_tile, step);
    if (step > 0) __syncthreads();  // all warps are done with the tiles before
    hidden.settle(hidden_tile);
    factor.settle(factor_tile);
    __syncthreads();
    multiply_tiles<typename K::Shape, typename K::HiddenTile, typename K::FactorTile>(
        hidden_tile, factor_tile, thread, sums);
  }
}

// The mask of the block, a byte per group of eight columns: [kM][kN / 8].
template <typename Shape>
__device__ __forceinline__ void draw_mask(
    const MatmulArguments& a, int64_t m, int64_t n, int thread, unsigned char* keep) {
  constexpr int kGroups = Shape::kN / kPhiloxGroup;
  const RngState state = {a.dropout.rng_state[0], a.dropout.rng_state[1]};
#pragma unroll 1
  for (int index = thread; index < Shape::kM * kGroups; index += Shape::kThreads) {
    const auto group = static_cast<uint32_t>(n / kPhiloxGroup + index % kGroups);
    uint32_t words[4], bits = 0;
    philox_4x32_10(state, group, static_cast<uint32_t>(m + index / kGroups), words);
#pragma unroll
    for (int c = 0; c < kPhiloxGroup; ++c) bits |= (philox_draw(words, c) >= a.dropout.threshold ? 1u : 0u) << c;
    keep[index] = static_cast<unsigned char>(bits);
  }
}

// sums = D * (scale sums).
template <typename Shape>
__device__ __forceinline__ void scale_and_drop(
    const MatmulArguments& a, int64_t m, int64_t n, int thread, unsigned char* keep, Sums<Shape>& sums) {
  const bool dropout = a.dropout.rng_state != nullptr;
  if (dropout) {
    draw_mask<Shape>(a, m, n, thread, keep);
    __syncthreads();
  }
  sums.for_each_pair(thread, [&](int row, int column, float& first, float& second) {
    const int group = row * (Shape::kN / kPhiloxGroup) + column / kPhiloxGroup;
    const int bits = dropout ? keep[group] >> column % kPhiloxGroup : 3;
    first = bits & 1 ? first * a.scale : 0.0f;
    second = bits & 2 ? second * a.scale : 0.0f;
  });
}

template <typename Shape, Along along>
__global__ void __launch_bounds__(Shape::kThreads) matmul_kernel(const __grid_constant__ MatmulArguments a) {
  using K = Matmul<Shape, along>;
  const int thread = static_cast<int>(threadIdx.x);
  auto* shared = dynamic_shared_memory<unsigned char>();
  const BlockPlace place = block_place(
      static_cast<int>(blockIdx.x), static_cast<int>((a.x.outer + Shape::kM - 1) / Shape::kM),
      static_cast<int>((a.matrix.outer + Shape::kN - 1) / Shape::kN));
  const int64_t m = int64_t{place.row} * Shape::kM, n = int64_t{place.column} * Shape::kN;
  typename K::XLoader x(a.x, place.row, 0, thread);
  typename K::MatrixLoader matrix(a.matrix, place.column, 0, thread);
  typename K::Loop loop(x, matrix, static_cast<int>((a.x.depth + kDepth - 1) / kDepth), shared);
  Sums<Shape> sums;
  sums.clear();
  loop.start();
  unsigned char* free_stage = shared + (Shape::kStages - 1) * K::Loop::kStageBytes;
  multiply_low_rank<K>(a, place, thread, free_stage, sums);
  scale_and_drop(a, m, n, thread, free_stage + K::kMaskOffset, sums);
  loop.run(thread, sums);
  __syncthreads();  // the stages become the staging memory
  store_dense(a.out, m, n, thread, shared, sums);
}

template <typename Element>
using Large = BlockShape<Element, 128, 128, 2, 4, 3>;
template <typename Element>
using Small = BlockShape<Element, 64, 64, 2, 2, 4>;

template <typename Shape, Along along>
void start(
    const char* operation, const Tensor& out, const Tensor& x, const Tensor& matrix, const std::optional<Tensor>& bias,
    const Tensor& hidden, const Tensor& factor, double scaling, const Dropout& dropout) {
  using K = Matmul<Shape, along>;
  MatmulArguments a = {};
  a.x = operand_view(x, 0, Along::depth);
  a.matrix = operand_view(matrix, 1, along);
  a.hidden = operand_view(hidden, 0, Along::depth);
  a.factor = operand_view(factor, 1, Along::depth);
  a.dropout = dropout_view(dropout);
  a.out = {
      out.mutable_data_ptr(),
      bias.has_value() ? bias->const_data_ptr() : nullptr,
      bias.has_value() ? bias->stride(0) : 0,
      out.size(0),
      out.size(1),
      allows_vectors(out.const_data_ptr(), out.size(1), 1, out.element_size())};
  a.scale = static_cast<float>(scaling * dropout.scale);
  const int64_t row_blocks = (a.x.outer + Shape::kM - 1) / Shape::kM;
  const int64_t column_blocks = (a.matrix.outer + Shape::kN - 1) / Shape::kN;
  const Grid grid = {
      .x = row_blocks * column_blocks,
      .threads = Shape::kThreads,
      .dynamic_shared_bytes = K::Loop::kSharedBytes,
  };
  launch(
      operation, grid, matmul_kernel<Shape, along>, a,
      {{"x", x},
       {"matrix", matrix},
       {"bias", bias.has_value() ? *bias : x},
       {"hidden", hidden},
       {"factor", factor},
       {"rng_state", rng_operand(dropout, x)},
       {"out", out, Access::write}});
}

// The large block where enough of them fill a GPU.
bool prefers_large(int64_t rows, int64_t columns) {
  constexpr int64_t kLeastBlocks = 96;
  return rows > 64 && ((rows + 127) / 128) * ((columns + 127) / 128) >= kLeastBlocks;
}

}  // namespace

void start_matmul(
    const char* operation, const Tensor& out, const Tensor& x, const Tensor& matrix, const std::optional<Tensor>& bias,
    const Tensor& hidden, const Tensor& factor, double scaling, const Dropout& dropout) {
  if (out.numel() == 0) return;
  const bool large = prefers_large(out.size(0), out.size(1)), along_depth = matrix.stride(0) == 1;
  const auto run = [&]<typename Element>(Element) {
    const auto function = large
                              ? along_depth ? start<Large<Element>, Along::depth> : start<Large<Element>, Along::outer>
                          : along_depth ? start<Small<Element>, Along::depth>
                                        : start<Small<Element>, Along::outer>;
    function(operation, out, x, matrix, bias, hidden, factor, scaling, dropout);
  };
  x.scalar_type() == ScalarType::BFloat16 ? run(BFloat16()) : run(Half());
}

}  // namespace peft_kernels
