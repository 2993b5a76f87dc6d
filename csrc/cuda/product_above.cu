// The entries of grad_out [M, N]^T x [M, K] whose magnitude reaches a threshold, in order of position: the candidates
// for new entries of a sparse delta, without the gradient of the weight.
//
// Three stages, of which the first is all of the time. Each tile of the product stays on the chip; what reaches the
// threshold is appended to a list, all of a tile's at once and in order, wherever the list has come to by then; and
// each row of the tile says how many it has and where they are. A sum over these counts, in the order of the rows and
// tiles, says where they belong, and the last stage takes them there. So the list's order, which differs from run to
// run, does not show.
//
// FLOP: 2 M N K (float: three tf32 products of that). Bytes, read from L2 or beyond: e M (1/128 + 1/128) per element of
// the product; 16 per row and tile, and 12 per entry found, written and read again. The dense way writes and reads
// 4 N K.
#include <cuda_runtime.h>
#include <launch.cuh>
#include <shared_memory.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "../common/sparse_checks.h"
#include "block_place.h"
#include "gradient_tiles.h"
#include "running_sums.h"
#include "views.h"

namespace peft_kernels {
namespace {

constexpr bool kTakesFloat64 = false;

// A row of a tile that has `count` entries, from `slot` of the list on.
struct AboveArguments {
  OperandView grad_out, x;
  float threshold;
  int row_blocks, column_blocks;
  int64_t capacity;          // of the list
  unsigned long long* used;  // slots of the list; may come to exceed it
  int64_t *counts, *slots;   // [N, column blocks]
  int64_t* positions;        // [capacity]
  float* values;             // [capacity]
};

// What one row of a tile has: a bit per column, then where its entries go.
template <typename Shape>
struct FoundRow {
  uint32_t columns[Shape::kN / kLanes];
  uint32_t before;  // entries of the tile's rows before it
};

// Stages the sums and marks those that reach the threshold; a warp takes a row.
template <typename Shape>
__device__ __forceinline__ void mark_entries(
    const AboveArguments& a, const BlockPlace& place, int thread, float* staged, FoundRow<Shape>* rows,
    Sums<Shape>& sums) {
  using Staged = Tile<float, Along::depth, Shape::kM, Shape::kN>;
  sums.for_each_pair(thread, [&](int row, int column, float first, float second) {
    *reinterpret_cast<float2*>(staged + Staged::offset(row, column)) = make_float2(first, second);
  });
  __syncthreads();
  const int lane = thread % kLanes;
#pragma unroll 1
  for (int row = thread / kLanes; row < Shape::kM; row += Shape::kThreads / kLanes) {
    const bool inside = int64_t{place.row} * Shape::kM + row < a.grad_out.outer;
#pragma unroll
    for (int word = 0; word < Shape::kN / kLanes; ++word) {
      const int column = word * kLanes + lane;
      const bool there = inside && int64_t{place.column} * Shape::kN + column < a.x.outer;
      const float magnitude = fabsf(staged[Staged::offset(row, column)]);
      const uint32_t found = __ballot_sync(~0u, there && !(magnitude < a.threshold));  // NaN reaches any
      if (lane == 0) rows[row].columns[word] = found;
    }
  }
}

// Counts what the rows before each row have; returns all that the tile has. One warp, each lane some rows.
template <typename Shape>
__device__ __forceinline__ uint32_t count_entries(FoundRow<Shape>* rows, int lane) {
  constexpr int kRows = Shape::kM / kLanes;
  uint32_t counts[kRows], own = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    counts[i] = 0;
#pragma unroll
    for (const uint32_t columns : rows[lane * kRows + i].columns) counts[i] += __popc(columns);
    own += counts[i];
  }
  uint32_t through = own;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, through, distance);
    if (lane >= distance) through += other;
  }
  uint32_t before = through - own;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    rows[lane * kRows + i].before = before;
    before += counts[i];
  }
  return __shfl_sync(~0u, through, kLanes - 1);
}

// Appends the entries to the list, a warp a row; says for each row how many and where.
template <typename Shape>
__device__ __forceinline__ void append_entries(
    const AboveArguments& a, const BlockPlace& place, int thread, const float* staged, const FoundRow<Shape>* rows,
    int64_t first_slot) {
  using Staged = Tile<float, Along::depth, Shape::kM, Shape::kN>;
  const int lane = thread % kLanes;
#pragma unroll 1
  for (int row = thread / kLanes; row < Shape::kM; row += Shape::kThreads / kLanes) {
    const int64_t n = int64_t{place.row} * Shape::kM + row;
    if (n >= a.grad_out.outer) return;
    const int64_t slot = first_slot + rows[row].before;
    uint32_t count = 0;
#pragma unroll
    for (int word = 0; word < Shape::kN / kLanes; ++word) {
      const uint32_t found = rows[row].columns[word];
      const int64_t own = slot + count + __popc(found & ((1u << lane) - 1));
      if ((found >> lane & 1) && own < a.capacity) {
        const int column = word * kLanes + lane;
        a.positions[own] = n * a.x.outer + int64_t{place.column} * Shape::kN + column;
        a.values[own] = staged[Staged::offset(row, column)];
      }
      count += __popc(found);
    }
    if (lane > 0) continue;
    a.counts[n * a.column_blocks + place.column] = count;
    a.slots[n * a.column_blocks + place.column] = slot;
  }
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, GradientTiles<Shape>::kBlocks)
    product_above_kernel(const __grid_constant__ AboveArguments a) {
  using K = GradientTiles<Shape>;
  __shared__ FoundRow<Shape> rows[Shape::kM];
  __shared__ unsigned long long first_slot;
  const int thread = static_cast<int>(threadIdx.x);
  const BlockPlace place = block_place(static_cast<int>(blockIdx.x), a.row_blocks, a.column_blocks);
  auto* shared = dynamic_shared_memory<unsigned char>();
  typename K::LeftLoader grad_out(a.grad_out, place.row, 0, thread);
  typename K::RightLoader x(a.x, place.column, 0, thread);
  typename K::Loop loop(grad_out, x, static_cast<int>((a.x.depth + K::kTokens - 1) / K::kTokens), shared);
  Sums<Shape> sums;
  sums.clear();
  loop.start();
  loop.run(thread, sums);
  __syncthreads();  // the stages become the staging memory
  auto* staged = reinterpret_cast<float*>(shared);
  mark_entries<Shape>(a, place, thread, staged, rows, sums);
  __syncthreads();
  if (thread < kLanes) {
    const uint32_t count = count_entries<Shape>(rows, thread);
    if (thread == 0) first_slot = count == 0 ? 0 : atomicAdd(a.used, static_cast<unsigned long long>(count));
  }
  __syncthreads();
  append_entries<Shape>(a, place, thread, staged, rows, static_cast<int64_t>(first_slot));
}

constexpr int kThreads = 256;

struct OrderArguments {
  const int64_t *counts, *slots, *ends;  // [cells]; ends: counts up to and with each cell
  const int64_t* listed_positions;
  const float* listed_values;
  int64_t cells, capacity;
  int64_t* positions;
  float* values;
  int64_t* count;
};

// A thread takes a row of a tile: its entries lie together in the list and in the result.
__global__ void __launch_bounds__(kThreads) order_entries_kernel(const __grid_constant__ OrderArguments a) {
  const int64_t cell = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (cell >= a.cells) return;
  const int64_t count = a.counts[cell], from = a.slots[cell], to = a.ends[cell] - count;
  if (cell == a.cells - 1) *a.count = to + count;
  for (int64_t i = 0; i < count && from + i < a.capacity && to + i < a.capacity; ++i) {
    a.positions[to + i] = a.listed_positions[from + i];
    a.values[to + i] = a.listed_values[from + i];
  }
}

// The smallest float that is not below the threshold: what a float reaches is then the same.
float float_threshold(double threshold) {
  const auto nearest = static_cast<float>(threshold);
  return nearest < threshold ? std::nextafter(nearest, std::numeric_limits<float>::infinity()) : nearest;
}

template <typename Shape>
void start(
    const char* op, const Tensor& grad_out, const Tensor& x, double threshold, const Tensor& positions,
    const Tensor& values, const Tensor& count) {
  using K = GradientTiles<Shape>;
  const int64_t rows = grad_out.size(1), columns = x.size(1), capacity = positions.numel();
  AboveArguments a = {};
  a.grad_out = operand_view(grad_out, 1, Along::outer);
  a.x = operand_view(x, 1, Along::outer);
  a.threshold = float_threshold(threshold);
  a.row_blocks = static_cast<int>((rows + Shape::kM - 1) / Shape::kM);
  a.column_blocks = static_cast<int>((columns + Shape::kN - 1) / Shape::kN);
  a.capacity = capacity;
  const Tensor used = torch::stable::new_zeros(x, {1}, ScalarType::Long);
  const Tensor counts = torch::stable::new_empty(x, {rows * a.column_blocks}, ScalarType::Long);
  const Tensor slots = torch::stable::new_empty(counts, {counts.numel()});
  const Tensor listed_positions = torch::stable::new_empty(positions, {capacity});
  const Tensor listed_values = torch::stable::new_empty(values, {capacity});
  a.used = static_cast<unsigned long long*>(used.mutable_data_ptr());
  a.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  a.slots = static_cast<int64_t*>(slots.mutable_data_ptr());
  a.positions = static_cast<int64_t*>(listed_positions.mutable_data_ptr());
  a.values = static_cast<float*>(listed_values.mutable_data_ptr());
  const Grid grid = {
      .x = int64_t{a.row_blocks} * a.column_blocks,
      .threads = Shape::kThreads,
      .dynamic_shared_bytes = K::Loop::kSharedBytes};
  launch(
      op, grid, product_above_kernel<Shape>, a,
      {{"grad_out", grad_out},
       {"x", x},
       {"used", used, Access::write},
       {"counts", counts, Access::write},
       {"slots", slots, Access::write},
       {"listed_positions", listed_positions, Access::write},
       {"listed_values", listed_values, Access::write}});

  const Tensor ends = running_sums(counts);
  const OrderArguments ordered = {
      a.counts,
      a.slots,
      static_cast<const int64_t*>(ends.const_data_ptr()),
      a.positions,
      a.values,
      counts.numel(),
      capacity,
      static_cast<int64_t*>(positions.mutable_data_ptr()),
      static_cast<float*>(values.mutable_data_ptr()),
      static_cast<int64_t*>(count.mutable_data_ptr())};
  launch(
      op, {.x = (ordered.cells + kThreads - 1) / kThreads, .threads = kThreads}, order_entries_kernel, ordered,
      {{"counts", counts},
       {"slots", slots},
       {"ends", ends},
       {"listed_positions", listed_positions},
       {"listed_values", listed_values},
       {"positions", positions, Access::write},
       {"values", values, Access::write},
       {"count", count, Access::write}});
}

std::tuple<Tensor, Tensor, Tensor> product_above(
    const Tensor& grad_out, const Tensor& x, double threshold, int64_t capacity) {
  constexpr const char* op = "product_above";
  check_product_above(op, grad_out, x, threshold, capacity, kTakesFloat64);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor positions = torch::stable::new_empty(x, {capacity}, ScalarType::Long);
  Tensor values = torch::stable::new_empty(x, {capacity}, ScalarType::Float);
  Tensor count = torch::stable::new_zeros(x, {1}, ScalarType::Long);
  if (grad_out.size(1) * x.size(1) == 0) return {positions, values, count};
  with_tile_shape(dtype_of(x.scalar_type()), grad_out.size(1), x.size(1), [&](auto shape) {
    start<decltype(shape)>(op, grad_out, x, threshold, positions, values, count);
  });
  return {positions, values, count};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) { m.impl("product_above", TORCH_BOX(&peft_kernels::product_above)); }
