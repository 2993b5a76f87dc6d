// values = (grad_out [M, N]^T x [M, K]) at sorted flat positions, through tiles of the product that stay on the chip.
//
// FLOP: 2 M per element of every tile that has an entry (float: three tf32 products of that). Bytes, read from L2 or
// beyond: e M (1/128 + 1/128) per element of such a tile, e that of the dtype; the product itself, which a dense
// gradient writes and a gather reads again, never reaches memory.
//
// Where each row's entries begin in each column of tiles is written by a kernel of its own, 8 bytes per row and tile:
// in front of a tile the same searches would be a chain of some twenty reads, and it must know whether it has an entry
// before it does anything. Nothing is kept between calls, so that the caller has one list of positions and no other.
#include <cuda_runtime.h>
#include <launch.cuh>
#include <shared_memory.h>
#include <torch/csrc/stable/ops.h>

#include "block_place.h"
#include "epilogues.h"
#include "gradient_tiles.h"
#include "partial_sums.h"
#include "sampled_product.h"
#include "views.h"

namespace peft_kernels {
namespace {

constexpr int kStartsThreads = 256;

struct StartsArguments {
  IndicesView indices;
  int64_t entries;
  int64_t rows, columns;    // of the product
  int tile_columns, tiles;  // columns of a tile, tiles in a row
  int64_t* starts;          // [rows, tiles + 1]: the first entry of the row at or behind the tile's first column
};

// A warp takes a row: two lanes search for its ends in the whole list, then all within it.
__global__ void __launch_bounds__(kStartsThreads) tile_starts_kernel(const __grid_constant__ StartsArguments a) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kStartsThreads / kLanes) + threadIdx.x / kLanes;
  if (row >= a.rows) return;
  const int64_t origin = row * a.columns;
  int64_t end = 0;
  if (lane < 2) end = lower_bound(a.indices, 0, a.entries, origin + lane * a.columns);
  const int64_t first = __shfl_sync(~0u, end, 0), last = __shfl_sync(~0u, end, 1);
  int64_t* starts = a.starts + row * (a.tiles + 1);
  for (int tile = lane; tile <= a.tiles; tile += kLanes) {
    starts[tile] =
        tile == a.tiles ? last : lower_bound(a.indices, first, last, origin + int64_t{tile} * a.tile_columns);
  }
}

struct TilesArguments {
  OperandView grad_out, x;
  const int64_t* starts;
  EntriesView out;
  int64_t entries;  // from the results of one split to those of the next
  int row_blocks, column_blocks;
  int steps, steps_per_split;
};

// Whether the tile has an entry, and `rows`: what it has of each row.
template <typename Shape>
__device__ __forceinline__ bool find_entries(
    const TilesArguments& a, const BlockPlace& place, int thread, RowEntries (&rows)[Shape::kM]) {
  bool any = false;
  for (int row = thread; row < Shape::kM; row += Shape::kThreads) {
    const int64_t n = int64_t{place.row} * Shape::kM + row;
    RowEntries entries = {0, 0};
    if (n < a.grad_out.outer) {
      const int64_t* starts = a.starts + n * (a.column_blocks + 1) + place.column;
      entries.first = starts[0];
      entries.count = static_cast<int32_t>(starts[1] - starts[0]);
    }
    rows[row] = entries;
    any = any || entries.count > 0;
  }
  return __syncthreads_or(any);
}

// Grid: tiles, splits of the tokens.
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, GradientTiles<Shape>::kBlocks)
    sampled_tiles_kernel(const __grid_constant__ TilesArguments a) {
  using K = GradientTiles<Shape>;
  __shared__ RowEntries rows[Shape::kM];
  const int thread = static_cast<int>(threadIdx.x);
  const BlockPlace place = block_place(static_cast<int>(blockIdx.x), a.row_blocks, a.column_blocks);
  if (!find_entries<Shape>(a, place, thread, rows)) return;
  auto* shared = dynamic_shared_memory<unsigned char>();
  const int first_step = static_cast<int>(blockIdx.y) * a.steps_per_split, steps_left = a.steps - first_step;
  typename K::LeftLoader grad_out(a.grad_out, place.row, first_step, thread);
  typename K::RightLoader x(a.x, place.column, first_step, thread);
  typename K::Loop loop(grad_out, x, steps_left < a.steps_per_split ? steps_left : a.steps_per_split, shared);
  Sums<Shape> sums;
  sums.clear();
  loop.start();
  loop.run(thread, sums);
  __syncthreads();          // the stages become the staging memory
  EntriesView out = a.out;  // of this split; more than one are float
  if (gridDim.y > 1) out.values = static_cast<float*>(out.values) + blockIdx.y * a.entries;
  store_entries(out, rows, int64_t{place.row} * Shape::kM, int64_t{place.column} * Shape::kN, thread, shared, sums);
}

template <typename Shape>
void start(const char* operation, const Tensor& out, const Tensor& grad_out, const Tensor& x, const Tensor& indices) {
  using K = GradientTiles<Shape>;
  const int64_t rows = grad_out.size(1), columns = x.size(1), entries = out.numel();
  TilesArguments a = {};
  a.grad_out = operand_view(grad_out, 1, Along::outer);
  a.x = operand_view(x, 1, Along::outer);
  a.entries = entries;
  a.row_blocks = static_cast<int>((rows + Shape::kM - 1) / Shape::kM);
  a.column_blocks = static_cast<int>((columns + Shape::kN - 1) / Shape::kN);
  a.steps = static_cast<int>((a.x.depth + K::kTokens - 1) / K::kTokens);

  const Tensor starts = torch::stable::new_empty(indices, {rows, a.column_blocks + 1}, ScalarType::Long);
  const StartsArguments searched = {
      indices_view(indices),
      entries,
      rows,
      columns,
      Shape::kN,
      a.column_blocks,
      static_cast<int64_t*>(starts.mutable_data_ptr())};
  constexpr int64_t kRows = kStartsThreads / kLanes;
  const Grid starts_grid = {.x = (rows + kRows - 1) / kRows, .threads = kStartsThreads};
  launch(
      operation, starts_grid, tile_starts_kernel, searched, {{"indices", indices}, {"starts", starts, Access::write}});

  const int64_t blocks = int64_t{a.row_blocks} * a.column_blocks;
  const Splits splits = split_steps(a.steps, blocks);
  a.steps_per_split = splits.steps_per_split;
  const Tensor sums =
      splits.count == 1 ? out : torch::stable::new_empty(out, {splits.count, entries}, ScalarType::Float);
  a.starts = searched.starts;
  a.out = {searched.indices, columns, sums.mutable_data_ptr(), dtype_of(sums.scalar_type())};
  const Grid grid = {
      .x = blocks, .y = splits.count, .threads = Shape::kThreads, .dynamic_shared_bytes = K::Loop::kSharedBytes};
  launch(
      operation, grid, sampled_tiles_kernel<Shape>, a,
      {{"grad_out", grad_out}, {"x", x}, {"indices", indices}, {"starts", starts}, {"out", sums, Access::write}});
  if (splits.count > 1) add_partial_sums(operation, sums, out);
}

}  // namespace

void start_sampled_tiles(
    const char* operation, const Tensor& out, const Tensor& grad_out, const Tensor& x, const Tensor& indices) {
  with_tile_shape(dtype_of(x.scalar_type()), grad_out.size(1), x.size(1), [&](auto shape) {
    start<decltype(shape)>(operation, out, grad_out, x, indices);
  });
}

}  // namespace peft_kernels
