// Rows of kept tokens on CUDA devices: gathered, added back, and heads rotated at the positions they had. Formulas in
// peft_kernels/reference/token_elimination.py.
//
// Bytes, e to an element of x [M, C], S rows kept; memory bounds all of them:
// gather_rows reads e S C and writes as much. At M = 16384, C = 4096, half kept, 16 bits: 134 MB, 45 us of an H100's
// memory at 3.0 TB/s [calculated].
// scatter_add_rows_ reads 2 e S C and writes e S C: 201 MB, 67 us [calculated].
// scatter_add_rows reads e (M + S) C and writes e M C in one pass: 335 MB, 112 us [calculated]. Which value a row gets
// says a map of 4 bytes per row (row_map.h), some 0.1 MB; to copy residual and then add at rows would read and write
// the kept rows once more, 2 e S C or 134 MB.
// rope_rows reads and writes x once, e S heads D each way; cos and sin, 2 R numbers per token, come from L1 after the
// first head: 16384 tokens of 32 heads of 128 in 16 bits are 268 MB, 90 us [calculated].
#include <cuda_runtime.h>
#include <launch.cuh>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../common/token_checks.h"
#include "picked_chunks.h"
#include "row_map.h"

namespace peft_kernels {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr bool kTakesFloat64 = false;
constexpr int kRows = 4;  // of a thread

const int32_t* row_numbers(const Tensor& rows) { return static_cast<const int32_t*>(rows.const_data_ptr()); }

// The rows that a list names at a thread's places, -1 behind its end.
__device__ __forceinline__ void load_rows(const int32_t* list, const Place& place, int64_t (&rows)[kRows]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) rows[i] = i < place.count ? list[place.row + i] : -1;
}

// --- out [S, C] = x[rows] ---

struct GatherArguments {
  RowsView x, out;
  const int32_t* rows;
  Size size;  // of out
};

template <typename Bits>
__global__ void __launch_bounds__(kChunkThreads) gather_rows_kernel(const __grid_constant__ GatherArguments a) {
  const Place place = place_of_thread<Bits, kRows>(a.size);
  if (place.count == 0) return;
  int64_t rows[kRows];
  load_rows(a.rows, place, rows);
  Chunk<Bits> chunks[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    chunks[i] = load_chunk<Bits>(a.x, rows[i], place.column, rows[i] < 0 ? 0 : a.size.columns);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (i < place.count) store_chunk(a.out, place.row + i, place.column, a.size.columns, chunks[i]);
  }
}

Tensor gather_rows(const Tensor& x, const Tensor& rows) {
  constexpr const char* op = "gather_rows";
  check_activations(op, "x", x, kTakesFloat64);
  const int64_t count = check_rows(op, rows, x);
  const DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {count, x.size(1)}, x.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor own_rows = torch::stable::contiguous(rows);
  const GatherArguments a = {rows_view(x), rows_view(out, out.mutable_data_ptr()), row_numbers(own_rows), size_of(out)};
  const auto start = [&](auto bits) {
    using Bits = decltype(bits);
    launch(
        op, grid_of<Bits, kRows>(a.size), gather_rows_kernel<Bits>, a,
        {{"x", x}, {"rows", own_rows}, {"out", out, Access::write}});
  };
  if (x.element_size() == 4) {
    start(uint32_t());
  } else {
    start(uint16_t());
  }
  return out;
}

// --- residual [M, C] with values [S, C] added at rows ---

template <typename Element>
__device__ __forceinline__ Chunk<Element> sum_of(const Chunk<Element>& residual, const Chunk<Element>& values) {
  Chunk<Element> sums = {};
#pragma unroll
  for (int c = 0; c < kChunk<Element>; ++c) sums.set(c, residual[c] + values[c]);
  return sums;
}

struct ScatterArguments {
  RowsView residual, values, out;
  const uint32_t* map;
  Size size;  // of out
};

template <typename Element>
__global__ void __launch_bounds__(kChunkThreads) scatter_add_rows_kernel(const __grid_constant__ ScatterArguments a) {
  const Place place = place_of_thread<Element, kRows>(a.size);
  if (place.count == 0) return;
  int64_t sources[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) sources[i] = i < place.count ? int64_t{a.map[place.row + i]} - 1 : -1;
  Chunk<Element> chunks[kRows], values[kRows];
  load_chunks(a.residual, place, a.size.columns, chunks);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    values[i] = load_chunk<Element>(a.values, sources[i], place.column, sources[i] < 0 ? 0 : a.size.columns);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (i >= place.count) return;
    // Others keep their bits: a sum would make zero of minus zero, and another NaN of a NaN.
    const Chunk<Element> chunk = sources[i] < 0 ? chunks[i] : sum_of(chunks[i], values[i]);
    store_chunk(a.out, place.row + i, place.column, a.size.columns, chunk);
  }
}

Tensor scatter_add_rows(const Tensor& residual, const Tensor& values, const Tensor& rows) {
  constexpr const char* op = "scatter_add_rows";
  check_activations(op, "residual", residual, kTakesFloat64);
  check_row_values(op, residual, values, rows);
  const DeviceGuard guard(residual.get_device_index());
  Tensor out = torch::stable::new_empty(residual, {residual.size(0), residual.size(1)}, residual.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor map = row_map(op, rows, residual.size(0));
  const ScatterArguments a = {
      rows_view(residual), rows_view(values), rows_view(out, out.mutable_data_ptr()), places_of(map), size_of(out)};
  with_element_type(dtype_of(residual.scalar_type()), [&](auto element) {
    using Element = decltype(element);
    launch(
        op, grid_of<Element, kRows>(a.size), scatter_add_rows_kernel<Element>, a,
        {{"residual", residual}, {"values", values}, {"map", map}, {"out", out, Access::write}});
  });
  return out;
}

// --- out[rows] += values, in place ---

struct AddArguments {
  RowsView out, values;
  const int32_t* rows;
  Size size;  // of values
};

template <typename Element>
__global__ void __launch_bounds__(kChunkThreads) add_rows_kernel(const __grid_constant__ AddArguments a) {
  const Place place = place_of_thread<Element, kRows>(a.size);
  if (place.count == 0) return;
  int64_t rows[kRows];
  load_rows(a.rows, place, rows);
  Chunk<Element> values[kRows], chunks[kRows];
  load_chunks(a.values, place, a.size.columns, values);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    chunks[i] = load_chunk<Element>(a.out, rows[i], place.column, rows[i] < 0 ? 0 : a.size.columns);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (rows[i] >= 0) store_chunk(a.out, rows[i], place.column, a.size.columns, sum_of(chunks[i], values[i]));
  }
}

void scatter_add_rows_(Tensor out, const Tensor& values, const Tensor& rows) {
  constexpr const char* op = "scatter_add_rows_";
  check_activations(op, "out", out, kTakesFloat64);
  check_apart(op, "out", out);
  check_row_values(op, out, values, rows);
  check_lies_apart(op, "out", out, "values", values);
  if (values.numel() == 0 || out.numel() == 0) return;
  const DeviceGuard guard(out.get_device_index());
  const Tensor own_rows = torch::stable::contiguous(rows);
  const AddArguments a = {
      rows_view(out, out.mutable_data_ptr()), rows_view(values), row_numbers(own_rows), size_of(values)};
  with_element_type(dtype_of(out.scalar_type()), [&](auto element) {
    using Element = decltype(element);
    launch(
        op, grid_of<Element, kRows>(a.size), add_rows_kernel<Element>, a,
        {{"out", out, Access::write}, {"values", values}, {"rows", own_rows}});
  });
}

// --- the heads of x [S, heads, D] rotated by rows of cos and sin [P, R] ---

constexpr int kHeads = 2;  // of a thread, which shares what it reads of the tables

struct RotationArguments {
  const void* x;
  void* out;  // contiguous
  int64_t token_stride, head_stride, column_stride;
  Stream cos, sin;  // at their first rows
  int64_t cos_stride, sin_stride;
  const int32_t* rows;  // null: row s for token s
  int64_t tokens, heads, width, half;
  int64_t pairs, units;  // of a head: chunks of its first half, and with them those that are copied
  bool x_vectors, out_vectors, inverse, narrow;
};

// A thread has a chunk of channels and the chunk they are rotated with, or a chunk that is copied, of a few heads.
template <typename Element>
__global__ void __launch_bounds__(kChunkThreads) rope_rows_kernel(const __grid_constant__ RotationArguments a) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kChunkThreads + threadIdx.x;
  const int64_t head_groups = (a.heads + kHeads - 1) / kHeads;
  const int64_t group = quotient(index, a.units, a.narrow), unit = index - group * a.units;
  const int64_t token = quotient(group, head_groups, a.narrow), head = (group - token * head_groups) * kHeads;
  if (token >= a.tokens) return;
  const int64_t row = a.rows == nullptr ? token : a.rows[token];
  const bool rotated = unit < a.pairs;
  const int64_t column = rotated ? unit * kChunk<Element> : 2 * a.half + (unit - a.pairs) * kChunk<Element>;
  const int64_t left = (rotated ? a.half : a.width) - column, count = row < 0 ? 0 : left;
  Chunk<Element> first[kHeads], second[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int64_t from = token * a.token_stride + (head + i) * a.head_stride, there = head + i < a.heads ? count : 0;
    first[i] = load_run<Element>(a.x, from + column * a.column_stride, a.column_stride, there, a.x_vectors);
    second[i] = load_run<Element>(
        a.x, from + (column + a.half) * a.column_stride, a.column_stride, rotated ? there : 0, a.x_vectors);
  }
  float cosines[2][kChunk<Element>], sines[2][kChunk<Element>];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int64_t place = column + part * a.half, there = rotated ? count : 0;
    load_numbers<Element>(a.cos, row * a.cos_stride + place, there, cosines[part]);
    load_numbers<Element>(a.sin, row * a.sin_stride + place, there, sines[part]);
  }
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (head + i >= a.heads) return;
    const int64_t to = (token * a.heads + head + i) * a.width + column;
    if (!rotated) {
      store_run<Element>(a.out, to, 1, left, a.out_vectors, first[i]);
      continue;
    }
    Chunk<Element> turned_first = {}, turned_second = {};
#pragma unroll
    for (int c = 0; c < kChunk<Element>; ++c) {
      const float x = first[i][c], y = second[i][c];
      const float from_second = a.inverse ? -sines[1][c] : sines[0][c];
      const float from_first = a.inverse ? -sines[0][c] : sines[1][c];
      turned_first.set(c, x * cosines[0][c] - y * from_second);
      turned_second.set(c, y * cosines[1][c] + x * from_first);
    }
    store_run<Element>(a.out, to, 1, left, a.out_vectors, turned_first);
    store_run<Element>(a.out, to + a.half, 1, left, a.out_vectors, turned_second);
  }
}

// A table whose columns are neighbors, and whether four of them can be read at once from each start.
Stream table_of(const Tensor& table, int64_t half) {
  Stream stream = stream_of(table);
  stream.vectors = stream.vectors && table.stride(0) % kThreadEntries == 0 && half % kThreadEntries == 0;
  return stream;
}

Tensor rope_rows(const Tensor& x, const Tensor& cos, const Tensor& sin, std::optional<Tensor> rows, bool inverse) {
  constexpr const char* op = "rope_rows";
  check_rope(op, x, cos, sin, rows, kTakesFloat64);
  if (rows.has_value()) rows = torch::stable::contiguous(*rows);
  const DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor own_cos = cos.stride(1) == 1 ? cos : torch::stable::contiguous(cos);
  const Tensor own_sin = sin.stride(1) == 1 ? sin : torch::stable::contiguous(sin);
  RotationArguments a = {};
  a.x = x.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.token_stride = x.stride(0);
  a.head_stride = x.stride(1);
  a.column_stride = x.stride(2);
  a.tokens = x.size(0);
  a.heads = x.size(1);
  a.width = x.size(2);
  a.half = cos.size(1) / 2;
  a.cos = table_of(own_cos, a.half);
  a.sin = table_of(own_sin, a.half);
  a.cos_stride = own_cos.stride(0);
  a.sin_stride = own_sin.stride(0);
  a.rows = rows.has_value() ? row_numbers(*rows) : nullptr;
  a.inverse = inverse;
  with_element_type(dtype_of(x.scalar_type()), [&](auto element) {
    using Element = decltype(element);
    constexpr int64_t kOwn = kChunk<Element>;
    const bool halves = a.half % kOwn == 0;
    a.x_vectors = halves && allows_vectors(a.x, a.token_stride, a.column_stride, sizeof(Element)) &&
                  allows_vectors(a.x, a.head_stride, a.column_stride, sizeof(Element));
    a.out_vectors = halves && a.width % kOwn == 0;
    a.pairs = (a.half + kOwn - 1) / kOwn;
    a.units = a.pairs + (a.width - 2 * a.half + kOwn - 1) / kOwn;
    const int64_t threads = a.tokens * ((a.heads + kHeads - 1) / kHeads) * a.units;
    a.narrow = fits_32_bits(threads + kChunkThreads);
    const Grid grid = {.x = (threads + kChunkThreads - 1) / kChunkThreads, .threads = kChunkThreads};
    launch(
        op, grid, rope_rows_kernel<Element>, a,
        {{"x", x},
         {"cos", own_cos},
         {"sin", own_sin},
         {"rows", rows.has_value() ? *rows : x},
         {"out", out, Access::write}});
  });
  return out;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("gather_rows", TORCH_BOX(&peft_kernels::gather_rows));
  m.impl("scatter_add_rows", TORCH_BOX(&peft_kernels::scatter_add_rows));
  m.impl("scatter_add_rows_", TORCH_BOX(&peft_kernels::scatter_add_rows_));
  m.impl("rope_rows", TORCH_BOX(&peft_kernels::rope_rows));
}
