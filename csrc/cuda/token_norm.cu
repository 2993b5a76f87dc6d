// RMSNorm of the rows of kept tokens on CUDA devices, gathered in the same pass, and its gradient added to the
// residual's. Formulas in peft_kernels/reference/token_elimination.py.
//
// Bytes, e to an element of x [M, H], S rows kept; memory bounds all of them:
// gather_rms_norm reads e S H and writes 2 e S H (h and kept), e S H without rows. At M = 16384, H = 4096, half kept,
// 16 bits: 201 MB, 67 us of an H100's memory at 3.0 TB/s [calculated].
// rms_norm_rows reads and writes e S H: 134 MB, 45 us [calculated].
// gather_rms_norm_backward reads e (M + 2 S) H and writes e M H in one pass over all rows, which a map of 4 bytes per
// row (row_map.h) leads to the kept ones: 403 MB, 134 us [calculated]. The weight's gradient, rarely wanted, reads
// 2 e S H once more: its sums go down the columns, those of dx along the rows.
//
// A block takes a row and keeps it in registers between the sum and the result, up to H = 8192; of longer rows the rest
// is read again, from L2. The order of additions follows from H, and for the weight from S and H.
#include <cuda_runtime.h>
#include <launch.cuh>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>

#include "../common/token_checks.h"
#include "block_sums.h"
#include "partial_sums.h"
#include "picked_chunks.h"
#include "row_map.h"

namespace peft_kernels {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr bool kTakesFloat64 = false;

// Of a row a thread holds 16 elements: two chunks, four of float.
template <typename Element>
constexpr int kHeld = 16 / kChunk<Element>;

// The blocks at once on a multiprocessor that the compiler is told of: 32 warps, each with its reads under way.
// Backward has three rows, of which float fills the registers of 16.
template <int kWarps>
constexpr int kBlocks = 32 / kWarps;
template <typename Element, int kWarps>
constexpr int kBackwardBlocks = sizeof(Element) == 4 ? kBlocks<kWarps> / 2 : kBlocks<kWarps>;

// Calls `function` with the warps that share a row: few keep more of the reads of a short one under way.
template <typename Function>
void with_warps(int64_t columns, const Function& function) {
  if (columns <= 16 * kLanes * 4) {
    function(std::integral_constant<int, 4>());
  } else {
    function(std::integral_constant<int, 16>());
  }
}

// The part of a row that a thread holds; zeros where there is none.
template <typename Element, int kThreads>
__device__ __forceinline__ void load_held(
    const RowsView& from, int64_t row, int64_t columns, Chunk<Element> (&held)[kHeld<Element>]) {
#pragma unroll
  for (int i = 0; i < kHeld<Element>; ++i) {
    const int64_t column = (int64_t{threadIdx.x} + i * kThreads) * kChunk<Element>;
    held[i] = load_chunk<Element>(from, row, column, columns);
  }
}

// Calls visit(column, i) for the chunks that a thread holds, then visit(column, -1) for those of a longer row.
template <typename Element, int kThreads, typename Visit>
__device__ __forceinline__ void for_chunks(int64_t columns, const Visit& visit) {
  int64_t column = int64_t{threadIdx.x} * kChunk<Element>;
#pragma unroll
  for (int i = 0; i < kHeld<Element>; ++i, column += kThreads * kChunk<Element>) {
    if (column < columns) visit(column, i);
  }
#pragma unroll 1
  for (; column < columns; column += kThreads * kChunk<Element>) visit(column, -1);
}

// h of a chunk. Two products, each rounded: no place for a fused one, so that h has the same bits wherever it is
// formed.
template <typename Element>
__device__ __forceinline__ Chunk<Element> normalized_chunk(
    const Chunk<Element>& kept, float rstd, const float (&weight)[kChunk<Element>], float offset) {
  Chunk<Element> h = {};
#pragma unroll
  for (int c = 0; c < kChunk<Element>; ++c) h.set(c, kept[c] * rstd * (weight[c] + offset));
  return h;
}

// --- h = kept rstd (offset + weight), kept = x[rows] ---

struct ForwardArguments {
  RowsView x, h, kept;
  const int32_t* rows;  // null: all, and kept is not written
  Stream weight;
  float* rstd;
  int64_t columns;
  float eps, offset;
};

template <typename Element, int kWarps>
__global__ void __launch_bounds__(kLanes* kWarps, kBlocks<kWarps>)
    gather_rms_norm_kernel(const __grid_constant__ ForwardArguments a) {
  constexpr int kThreads = kLanes * kWarps;
  const int64_t place = blockIdx.x, row = a.rows == nullptr ? place : a.rows[place];
  const int64_t there = row < 0 ? 0 : a.columns;
  Chunk<Element> held[kHeld<Element>];
  load_held<Element, kThreads>(a.x, row, there, held);
  float squares = 0.0f;
  for_chunks<Element, kThreads>(there, [&](int64_t column, int i) {
    const Chunk<Element> chunk = i >= 0 ? held[i] : load_chunk<Element>(a.x, row, column, there);
#pragma unroll
    for (int c = 0; c < kChunk<Element>; ++c) squares = fmaf(chunk[c], chunk[c], squares);
  });
  squares = block_sum<kWarps>(squares, static_cast<int>(threadIdx.x));
  const float rstd = rsqrtf(squares / static_cast<float>(a.columns) + a.eps);
  if (threadIdx.x == 0) a.rstd[place] = rstd;
  for_chunks<Element, kThreads>(a.columns, [&](int64_t column, int i) {
    const Chunk<Element> chunk = i >= 0 ? held[i] : load_chunk<Element>(a.x, row, column, there);
    float weight[kChunk<Element>];
    load_numbers<Element>(a.weight, column, a.columns - column, weight);
    if (a.rows != nullptr) store_chunk(a.kept, place, column, a.columns, chunk);
    store_chunk(a.h, place, column, a.columns, normalized_chunk(chunk, rstd, weight, a.offset));
  });
}

std::tuple<Tensor, Tensor, Tensor> gather_rms_norm(
    const Tensor& x, std::optional<Tensor> rows, const Tensor& weight, double eps, double offset) {
  constexpr const char* op = "gather_rms_norm";
  const int64_t count = check_rms_norm(op, x, rows, weight, kTakesFloat64), columns = x.size(1);
  if (rows.has_value()) rows = torch::stable::contiguous(*rows);
  const DeviceGuard guard(x.get_device_index());
  Tensor h = torch::stable::new_empty(x, {count, columns}, x.scalar_type());
  Tensor kept = torch::stable::new_empty(x, {rows.has_value() ? count : 0, columns}, x.scalar_type());
  Tensor rstd = torch::stable::new_empty(x, {count}, ScalarType::Float);
  if (count == 0) return {h, kept, rstd};
  const Tensor own_weight = torch::stable::contiguous(weight);
  ForwardArguments a = {};
  a.x = rows_view(x);
  a.h = rows_view(h, h.mutable_data_ptr());
  a.kept = rows_view(kept, kept.mutable_data_ptr());
  a.rows = rows.has_value() ? static_cast<const int32_t*>(rows->const_data_ptr()) : nullptr;
  a.weight = stream_of(own_weight);
  a.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  a.columns = columns;
  a.eps = static_cast<float>(eps);
  a.offset = static_cast<float>(offset);
  with_element_type(dtype_of(x.scalar_type()), [&](auto element) {
    with_warps(columns, [&](auto warps) {
      launch(
          op, {.x = count, .threads = kLanes * warps}, gather_rms_norm_kernel<decltype(element), warps>, a,
          {{"x", x},
           {"rows", rows.has_value() ? *rows : x},
           {"weight", own_weight},
           {"h", h, Access::write},
           {"kept", kept, Access::write},
           {"rstd", rstd, Access::write}});
    });
  });
  return {h, kept, rstd};
}

// --- h again ---

constexpr int kRows = 4;  // of a thread, for which it reads the weight once

struct AgainArguments {
  RowsView kept, h;
  const float* rstd;
  Stream weight;
  float offset;
  Size size;
};

template <typename Element>
__global__ void __launch_bounds__(kChunkThreads) rms_norm_rows_kernel(const __grid_constant__ AgainArguments a) {
  const Place place = place_of_thread<Element, kRows>(a.size);
  if (place.count == 0) return;
  Chunk<Element> kept[kRows];
  load_chunks(a.kept, place, a.size.columns, kept);
  float weight[kChunk<Element>];
  load_numbers<Element>(a.weight, place.column, a.size.columns - place.column, weight);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (i >= place.count) return;
    const Chunk<Element> h = normalized_chunk(kept[i], a.rstd[place.row + i], weight, a.offset);
    store_chunk(a.h, place.row + i, place.column, a.size.columns, h);
  }
}

Tensor rms_norm_rows(const Tensor& kept, const Tensor& rstd, const Tensor& weight, double offset) {
  constexpr const char* op = "rms_norm_rows";
  check_kept(op, kept, rstd, weight, kTakesFloat64);
  const DeviceGuard guard(kept.get_device_index());
  Tensor h = torch::stable::new_empty(kept, {kept.size(0), kept.size(1)}, kept.scalar_type());
  if (h.numel() == 0) return h;
  const Tensor own_weight = torch::stable::contiguous(weight), own_rstd = torch::stable::contiguous(rstd);
  const AgainArguments a = {
      rows_view(kept),       rows_view(h, h.mutable_data_ptr()), static_cast<const float*>(own_rstd.const_data_ptr()),
      stream_of(own_weight), static_cast<float>(offset),         size_of(h)};
  with_element_type(dtype_of(kept.scalar_type()), [&](auto element) {
    using Element = decltype(element);
    launch(
        op, grid_of<Element, kRows>(a.size), rms_norm_rows_kernel<Element>, a,
        {{"kept", kept}, {"rstd", own_rstd}, {"weight", own_weight}, {"h", h, Access::write}});
  });
  return h;
}

// --- dx = grad_residual with dkept added at rows ---

struct BackwardArguments {
  RowsView residual, grad_h, kept, dx;
  bool has_residual;    // else zeros
  const uint32_t* map;  // null: row m is kept row m
  const float* rstd;
  Stream weight;
  int64_t columns;
  float offset;
};

template <typename Element, int kWarps>
__global__ void __launch_bounds__(kLanes* kWarps, kBackwardBlocks<Element, kWarps>)
    gather_rms_norm_backward_kernel(const __grid_constant__ BackwardArguments a) {
  constexpr int kThreads = kLanes * kWarps;
  const int64_t row = blockIdx.x, place = a.map == nullptr ? row : int64_t{a.map[row]} - 1;
  const int64_t in_residual = a.has_residual ? a.columns : 0, there = place < 0 ? 0 : a.columns;
  Chunk<Element> residual[kHeld<Element>], grad_h[kHeld<Element>], kept[kHeld<Element>];
  load_held<Element, kThreads>(a.residual, row, in_residual, residual);
  if (place < 0) {
    for_chunks<Element, kThreads>(a.columns, [&](int64_t column, int i) {
      store_chunk(
          a.dx, row, column, a.columns,
          i >= 0 ? residual[i] : load_chunk<Element>(a.residual, row, column, in_residual));
    });
    return;
  }
  load_held<Element, kThreads>(a.grad_h, place, there, grad_h);
  load_held<Element, kThreads>(a.kept, place, there, kept);
  const float rstd = a.rstd[place];
  float product = 0.0f;
  for_chunks<Element, kThreads>(a.columns, [&](int64_t column, int i) {
    const Chunk<Element> own_grad = i >= 0 ? grad_h[i] : load_chunk<Element>(a.grad_h, place, column, there);
    const Chunk<Element> own_kept = i >= 0 ? kept[i] : load_chunk<Element>(a.kept, place, column, there);
    float weight[kChunk<Element>];
    load_numbers<Element>(a.weight, column, a.columns - column, weight);
#pragma unroll
    for (int c = 0; c < kChunk<Element>; ++c) {
      product = fmaf(own_grad[c] * (weight[c] + a.offset), own_kept[c] * rstd, product);
    }
  });
  const float mean = block_sum<kWarps>(product, static_cast<int>(threadIdx.x)) / static_cast<float>(a.columns);
  for_chunks<Element, kThreads>(a.columns, [&](int64_t column, int i) {
    const Chunk<Element> own_grad = i >= 0 ? grad_h[i] : load_chunk<Element>(a.grad_h, place, column, there);
    const Chunk<Element> own_kept = i >= 0 ? kept[i] : load_chunk<Element>(a.kept, place, column, there);
    const Chunk<Element> own_residual =
        i >= 0 ? residual[i] : load_chunk<Element>(a.residual, row, column, in_residual);
    float weight[kChunk<Element>];
    load_numbers<Element>(a.weight, column, a.columns - column, weight);
    Chunk<Element> dx = {};
#pragma unroll
    for (int c = 0; c < kChunk<Element>; ++c) {
      const float scaled = own_grad[c] * (weight[c] + a.offset), normalized = own_kept[c] * rstd;
      dx.set(c, own_residual[c] + rstd * (scaled - normalized * mean));
    }
    store_chunk(a.dx, row, column, a.columns, dx);
  });
}

// --- dweight = sum of grad_h kept rstd over rows ---

constexpr int kWeightThreads = 64;  // blocks of few columns, as there may be few in all
constexpr int kWeightBlocks = 10;   // at once: left alone, the compiler takes the registers of four
constexpr int kStepRows = 4;

struct WeightArguments {
  RowsView grad_h, kept;
  const int32_t* rows;  // null: none is negative
  const float* rstd;
  float* partial;  // [splits, columns]
  int64_t count, columns;
  int steps_per_split;
};

// Grid: blocks of columns, splits of rows.
template <typename Element>
__global__ void __launch_bounds__(kWeightThreads, kWeightBlocks)
    norm_weight_grad_kernel(const __grid_constant__ WeightArguments a) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kWeightThreads + threadIdx.x) * kChunk<Element>;
  if (column >= a.columns) return;
  const int64_t begin = int64_t{blockIdx.y} * a.steps_per_split * kStepRows;
  const int64_t end = begin + int64_t{a.steps_per_split} * kStepRows, last = end < a.count ? end : a.count;
  float sums[kChunk<Element>] = {};
#pragma unroll 1
  for (int64_t first = begin; first < last; first += kStepRows) {
    Chunk<Element> grad_h[kStepRows], kept[kStepRows];
    float rstd[kStepRows];
#pragma unroll
    for (int i = 0; i < kStepRows; ++i) {
      const int64_t row = first + i;
      const bool counts = row < last && (a.rows == nullptr || a.rows[row] >= 0);
      grad_h[i] = load_chunk<Element>(a.grad_h, row, column, counts ? a.columns : 0);
      kept[i] = load_chunk<Element>(a.kept, row, column, counts ? a.columns : 0);
      rstd[i] = counts ? a.rstd[row] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kStepRows; ++i) {
#pragma unroll
      for (int c = 0; c < kChunk<Element>; ++c) sums[c] = fmaf(grad_h[i][c], kept[i][c] * rstd[i], sums[c]);
    }
  }
  float* partial = a.partial + blockIdx.y * a.columns + column;
#pragma unroll
  for (int c = 0; c < kChunk<Element>; ++c) {
    if (column + c < a.columns) partial[c] = sums[c];
  }
}

Tensor norm_weight_grad(
    const char* op, const Tensor& grad_h, const Tensor& kept, const Tensor& rstd, const Tensor& weight,
    const std::optional<Tensor>& rows) {
  const int64_t count = kept.size(0), columns = kept.size(1);
  if (count == 0 || columns == 0) return torch::stable::new_zeros(weight, {columns});
  Tensor out = torch::stable::new_empty(weight, {columns});
  with_element_type(dtype_of(kept.scalar_type()), [&](auto element) {
    using Element = decltype(element);
    constexpr int64_t kBlockColumns = kWeightThreads * kChunk<Element>;
    const int64_t blocks = (columns + kBlockColumns - 1) / kBlockColumns;
    const Splits splits = split_steps(static_cast<int>((count + kStepRows - 1) / kStepRows), blocks);
    const Tensor partial = torch::stable::new_empty(kept, {splits.count, columns}, ScalarType::Float);
    const WeightArguments a = {
        rows_view(grad_h),
        rows_view(kept),
        rows.has_value() ? static_cast<const int32_t*>(rows->const_data_ptr()) : nullptr,
        static_cast<const float*>(rstd.const_data_ptr()),
        static_cast<float*>(partial.mutable_data_ptr()),
        count,
        columns,
        splits.steps_per_split};
    launch(
        op, {.x = blocks, .y = splits.count, .threads = kWeightThreads}, norm_weight_grad_kernel<Element>, a,
        {{"grad_h", grad_h},
         {"kept", kept},
         {"rstd", rstd},
         {"rows", rows.has_value() ? *rows : rstd},
         {"partial", partial, Access::write}});
    add_partial_sums(op, partial, out);
  });
  return out;
}

std::tuple<Tensor, Tensor> gather_rms_norm_backward(
    std::optional<Tensor> grad_residual, const Tensor& grad_h, const Tensor& kept, Tensor rstd, const Tensor& weight,
    double offset, std::optional<Tensor> rows, int64_t total, bool weight_grad) {
  constexpr const char* op = "gather_rms_norm_backward";
  check_rms_norm_backward(op, grad_residual, grad_h, kept, rstd, weight, rows, total, kTakesFloat64);
  rstd = torch::stable::contiguous(rstd);
  if (rows.has_value()) rows = torch::stable::contiguous(*rows);
  const DeviceGuard guard(kept.get_device_index());
  const int64_t columns = kept.size(1);
  Tensor dx = torch::stable::new_empty(kept, {total, columns}, kept.scalar_type());
  if (dx.numel() > 0) {
    const Tensor own_weight = torch::stable::contiguous(weight);
    const Tensor map = rows.has_value() ? row_map(op, *rows, total) : rstd;
    BackwardArguments a = {};
    a.residual = rows_view(grad_residual.has_value() ? *grad_residual : kept);
    a.grad_h = rows_view(grad_h);
    a.kept = rows_view(kept);
    a.dx = rows_view(dx, dx.mutable_data_ptr());
    a.has_residual = grad_residual.has_value();
    a.map = rows.has_value() ? places_of(map) : nullptr;
    a.rstd = static_cast<const float*>(rstd.const_data_ptr());
    a.weight = stream_of(own_weight);
    a.columns = columns;
    a.offset = static_cast<float>(offset);
    with_element_type(dtype_of(kept.scalar_type()), [&](auto element) {
      with_warps(columns, [&](auto warps) {
        launch(
            op, {.x = total, .threads = kLanes * warps}, gather_rms_norm_backward_kernel<decltype(element), warps>, a,
            {{"grad_residual", grad_residual.has_value() ? *grad_residual : kept},
             {"grad_h", grad_h},
             {"kept", kept},
             {"rstd", rstd},
             {"weight", own_weight},
             {"map", map},
             {"dx", dx, Access::write}});
      });
    });
  }
  if (!weight_grad) return {dx, torch::stable::new_empty(weight, {0})};
  return {dx, norm_weight_grad(op, grad_h, kept, rstd, weight, rows)};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("gather_rms_norm", TORCH_BOX(&peft_kernels::gather_rms_norm));
  m.impl("rms_norm_rows", TORCH_BOX(&peft_kernels::rms_norm_rows));
  m.impl("gather_rms_norm_backward", TORCH_BOX(&peft_kernels::gather_rms_norm_backward));
}
