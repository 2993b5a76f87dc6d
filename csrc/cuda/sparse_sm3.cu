// One step of SM3 on the values of a sparse delta, with the write-back in the same pass. Formulas in
// peft_kernels/reference/sparse_delta.py.
//
// All second moments come from the old maxima, so the new ones are collected beside them, in float: a maximum of
// non-negative floats is one of their bits as integers, which atomics take in any order with the same result. A second
// kernel rounds them into the old ones; rounding keeps the order, so the result is that of rounding first.
//
// Bytes per entry with a bfloat16 weight, int32 positions and float values: 26 and the sector of the weight, as in
// sparse_delta.cu; the maxima, 4 (N + K), stay in L2. Atomics: one per entry for its column, and one for the entries of
// a row that one thread has. Memory bounds it.
#include <cuda_runtime.h>
#include <launch.cuh>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>

#include "../common/sparse_checks.h"
#include "sparse_entries.h"

namespace peft_kernels {
namespace {

constexpr bool kTakesFloat64 = false;

struct SM3Arguments {
  Stream values, grad;
  Stream exp_avg;  // data null: there is none
  Stream original;
  DeltaTarget target;  // weight null: nothing is written back; the positions are there always
  const void *row_max, *column_max;
  uint32_t *new_row_max, *new_column_max;  // bits of floats, zero before
  int64_t columns;
  bool narrow;  // whether positions fit 32 bits
  int64_t count;
  float decay;       // 1 - lr weight_decay
  float beta, rest;  // and 1 - beta
  float eps, lr;
};

// The smaller one, NaN if either is.
__device__ __forceinline__ float smaller(float first, float second) {
  return first < second || std::isnan(first) ? first : second;
}

// Without the sign, which only NaN can have here: it stays the largest.
__device__ __forceinline__ uint32_t magnitude_bits(float value) { return __float_as_uint(value) & 0x7FFFFFFFu; }

__global__ void __launch_bounds__(kEntryThreads) sm3_step_kernel(const __grid_constant__ SM3Arguments a) {
  const EntryRange range = entries_of_thread(a.count);
  if (range.count == 0) return;
  int64_t positions[kThreadEntries];
  load_positions(a.target, range, positions);
  const PackedEntries packed_values = load_packed(a.values, range), packed_grad = load_packed(a.grad, range);
  PackedEntries packed_average = {}, original = {};
  if (a.exp_avg.data != nullptr) packed_average = load_packed(a.exp_avg, range);
  if (a.target.weight != nullptr) original = load_packed(a.original, range);
  const DType dtype = a.values.dtype;
  int64_t rows[kThreadEntries];
  float second[kThreadEntries];
#pragma unroll
  for (int i = 0; i < kThreadEntries; ++i) {
    rows[i] =
        a.narrow ? static_cast<uint32_t>(positions[i]) / static_cast<uint32_t>(a.columns) : positions[i] / a.columns;
    second[i] = 0.0f;
    if (i >= range.count) continue;
    second[i] = smaller(
        load_float(a.row_max, rows[i], dtype), load_float(a.column_max, positions[i] - rows[i] * a.columns, dtype));
  }
  float values[kThreadEntries], grad[kThreadEntries], average[kThreadEntries];
  unpack(packed_values, dtype, values);
  unpack(packed_grad, dtype, grad);
  unpack(packed_average, dtype, average);
  uint32_t row_bits = 0;  // the largest of the entries of one row so far
#pragma unroll
  for (int i = 0; i < kThreadEntries; ++i) {
    second[i] = __fadd_rn(second[i], __fmul_rn(grad[i], grad[i]));  // the bits of the definition
    const float step = second[i] == 0.0f ? 0.0f : grad[i] / (sqrtf(second[i]) + a.eps);
    average[i] = a.exp_avg.data != nullptr ? a.beta * average[i] + a.rest * step : step;
    values[i] = values[i] * a.decay - a.lr * average[i];
    if (i >= range.count) continue;
    const uint32_t bits = magnitude_bits(second[i]);
    atomicMax(a.new_column_max + (positions[i] - rows[i] * a.columns), bits);
    row_bits = bits > row_bits ? bits : row_bits;
    if (i + 1 == range.count || rows[i + 1 < kThreadEntries ? i + 1 : i] != rows[i]) {
      atomicMax(a.new_row_max + rows[i], row_bits);
      row_bits = 0;
    }
  }
  if (a.exp_avg.data != nullptr) store_packed(a.exp_avg, range, pack(dtype, average));
  const PackedEntries rounded = pack(dtype, values);
  store_packed(a.values, range, rounded);
  if (a.target.weight == nullptr) return;
  float before[kThreadEntries];
  unpack(original, a.target.dtype, before);
  unpack(rounded, dtype, values);  // what the parameter holds is what the weight gets, in 16-bit values too
  write_sums(a.target, range, positions, before, 1.0f, values);
}

struct MaximaArguments {
  void *row_max, *column_max;
  const uint32_t* maxima;  // [N + K]
  int64_t rows, columns;
  DType dtype;
};

__global__ void __launch_bounds__(kEntryThreads) sm3_maxima_kernel(const __grid_constant__ MaximaArguments a) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kEntryThreads + threadIdx.x;
  if (index >= a.rows + a.columns) return;
  const bool of_rows = index < a.rows;
  void* maxima = of_rows ? a.row_max : a.column_max;
  const int64_t place = of_rows ? index : index - a.rows;
  const float found = __uint_as_float(a.maxima[index]);
  if (found > load_float(maxima, place, a.dtype) || std::isnan(found)) store_float(maxima, place, a.dtype, found);
}

void sparse_sm3_(
    Tensor values, const Tensor& grad, Tensor row_max, Tensor column_max, std::optional<Tensor> exp_avg,
    std::optional<Tensor> weight, const Tensor& indices, std::optional<Tensor> original, double lr, double beta,
    double eps, double weight_decay) {
  constexpr const char* op = "sparse_sm3_";
  const int64_t count =
      check_sm3(op, values, grad, row_max, column_max, exp_avg, weight, indices, original, kTakesFloat64);
  check_sm3_numbers(op, lr, beta, eps, weight_decay);
  if (count == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  const int64_t rows = row_max.numel(), columns = column_max.numel();
  const bool written = weight.has_value();
  const Tensor base = written ? torch::stable::contiguous(*original) : values;
  const Tensor maxima = torch::stable::new_zeros(values, {rows + columns}, ScalarType::Int);
  SM3Arguments a = {};
  a.values = stream_of(values, values.mutable_data_ptr());
  a.grad = stream_of(grad);
  if (exp_avg.has_value()) a.exp_avg = stream_of(*exp_avg, exp_avg->mutable_data_ptr());
  a.target = target_of(written ? *weight : values, indices);
  if (written) {
    a.original = stream_of(base);
  } else {
    a.target.weight = nullptr;
  }
  a.row_max = row_max.const_data_ptr();
  a.column_max = column_max.const_data_ptr();
  a.new_row_max = static_cast<uint32_t*>(maxima.mutable_data_ptr());
  a.new_column_max = a.new_row_max + rows;
  a.columns = columns;
  a.narrow = rows * columns <= int64_t{1} << 32;
  a.count = count;
  a.decay = static_cast<float>(1.0 - lr * weight_decay);
  a.beta = static_cast<float>(beta);
  a.rest = static_cast<float>(1.0 - beta);
  a.eps = static_cast<float>(eps);
  a.lr = static_cast<float>(lr);
  launch(
      op, grid_of_entries(count), sm3_step_kernel, a,
      {{"values", values, Access::write},
       {"grad", grad},
       {"exp_avg", exp_avg.has_value() ? *exp_avg : values, Access::write},
       {"weight", written ? *weight : values, Access::write},
       {"maxima", maxima, Access::write},
       {"row_max", row_max},
       {"column_max", column_max},
       {"indices", indices},
       {"original", base}});
  const MaximaArguments found = {
      row_max.mutable_data_ptr(),    column_max.mutable_data_ptr(), a.new_row_max, rows, columns,
      dtype_of(values.scalar_type())};
  const Grid grid = {.x = (rows + columns + kEntryThreads - 1) / kEntryThreads, .threads = kEntryThreads};
  launch(
      op, grid, sm3_maxima_kernel, found,
      {{"row_max", row_max, Access::write}, {"column_max", column_max, Access::write}, {"maxima", maxima}});
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) { m.impl("sparse_sm3_", TORCH_BOX(&peft_kernels::sparse_sm3_)); }
