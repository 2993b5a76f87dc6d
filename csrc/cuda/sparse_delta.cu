// Sparse deltas on CUDA devices: writes into a merged weight, and AdamW with the write-back in the same pass. Formulas
// in peft_kernels/reference/sparse_delta.py.
//
// Bytes per entry with a bfloat16 weight, int32 indices and float values: scatter_write_ reads 10 (position, original,
// value) and writes 2; scatter_accumulate_ reads 8 and reads and writes 2; sparse_adamw_ reads 22 (gradient, two
// moments and the value, position and original) and writes 14. A lone element of the weight costs its sector of 32
// bytes, read and written, so at a few percent of the weight and below that is most of the traffic. Some ten FLOP
// beside it: memory bounds all three, and sparse_entries.h keeps it busy.
#include <cuda_runtime.h>
#include <launch.cuh>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../common/sparse_checks.h"
#include "adamw.h"
#include "sparse_entries.h"

namespace peft_kernels {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr bool kTakesFloat64 = false;

struct ScatterArguments {
  DeltaTarget target;
  Stream original;  // data null: what stands there now
  Stream values;    // data null: original goes back as it is
  float factor;     // of values
  int64_t count;
};

__global__ void __launch_bounds__(kEntryThreads) scatter_kernel(const __grid_constant__ ScatterArguments a) {
  const EntryRange range = entries_of_thread(a.count);
  if (range.count == 0) return;
  int64_t positions[kThreadEntries];
  load_positions(a.target, range, positions);
  PackedEntries original = {}, values = {};
  if (a.original.data != nullptr) original = load_packed(a.original, range);
  if (a.values.data != nullptr) values = load_packed(a.values, range);
  float before[kThreadEntries], delta[kThreadEntries];
  if (a.original.data == nullptr) {
#pragma unroll
    for (int i = 0; i < kThreadEntries; ++i) {
      before[i] = i < range.count ? load_float(a.target.weight, positions[i], a.target.dtype) : 0.0f;
    }
  } else if (a.values.data != nullptr) {
    unpack(original, a.target.dtype, before);
  } else {  // bits, so that a NaN stays the one it was
    store_bits(a.target.weight, a.target.dtype, range, positions, original);
    return;
  }
  unpack(values, a.values.dtype, delta);
  write_sums(a.target, range, positions, before, a.factor, delta);
}

struct AdamWArguments {
  AdamWState state;
  Stream original;
  DeltaTarget target;  // weight null: nothing is written back
};

__global__ void __launch_bounds__(kEntryThreads) sparse_adamw_kernel(const __grid_constant__ AdamWArguments a) {
  const EntryRange range = entries_of_thread(a.state.count);
  if (range.count == 0) return;
  const bool written = a.target.weight != nullptr;
  int64_t positions[kThreadEntries] = {};
  PackedEntries original = {};
  if (written) {
    load_positions(a.target, range, positions);
    original = load_packed(a.original, range);
  }
  const PackedEntries rounded = adamw_step(a.state, range);
  if (!written) return;
  float before[kThreadEntries], values[kThreadEntries];
  unpack(original, a.target.dtype, before);
  unpack(rounded, a.state.values.dtype, values);  // what the parameter holds is what the weight gets
  write_sums(a.target, range, positions, before, 1.0f, values);
}

void scatter_write_(Tensor weight, const Tensor& indices, const Tensor& original, std::optional<Tensor> values) {
  constexpr const char* op = "scatter_write_";
  check_weight(op, weight, weight, kTakesFloat64);
  const int64_t count = check_indices(op, indices, weight);
  check_original(op, original, count, weight);
  if (values.has_value()) check_values(op, *values, count, weight, kTakesFloat64);
  if (count == 0) return;
  const DeviceGuard guard(weight.get_device_index());
  const Tensor base = torch::stable::contiguous(original);
  const Tensor changes = values.has_value() ? torch::stable::contiguous(*values) : base;
  ScatterArguments a = {};
  a.target = target_of(weight, indices);
  a.original = stream_of(base);
  if (values.has_value()) a.values = stream_of(changes);
  a.factor = 1.0f;
  a.count = count;
  launch(
      op, grid_of_entries(count), scatter_kernel, a,
      {{"weight", weight, Access::write}, {"indices", indices}, {"original", base}, {"values", changes}});
}

void scatter_accumulate_(Tensor weight, const Tensor& indices, const Tensor& values, double scaling) {
  constexpr const char* op = "scatter_accumulate_";
  check_weight(op, weight, weight, kTakesFloat64);
  const int64_t count = check_indices(op, indices, weight);
  check_values(op, values, count, weight, kTakesFloat64);
  if (count == 0) return;
  const DeviceGuard guard(weight.get_device_index());
  const Tensor changes = torch::stable::contiguous(values);
  ScatterArguments a = {};
  a.target = target_of(weight, indices);
  a.values = stream_of(changes);
  a.factor = static_cast<float>(scaling);
  a.count = count;
  launch(
      op, grid_of_entries(count), scatter_kernel, a,
      {{"weight", weight, Access::write}, {"indices", indices}, {"values", changes}});
}

void sparse_adamw_(
    Tensor values, const Tensor& grad, Tensor exp_avg, Tensor exp_avg_sq, std::optional<Tensor> weight,
    std::optional<Tensor> indices, std::optional<Tensor> original, int64_t step, double lr, double beta1, double beta2,
    double eps, double weight_decay) {
  constexpr const char* op = "sparse_adamw_";
  STD_TORCH_CHECK(values.dim() == 1, op, ": values must be 1-D, got ", described(values));
  check_values(op, values, values.numel(), values, kTakesFloat64);
  check_contiguous(op, "values", values);
  check_like_values(op, "grad", grad, values);
  check_like_values(op, "exp_avg", exp_avg, values);
  check_like_values(op, "exp_avg_sq", exp_avg_sq, values);
  const bool written = check_write_back(op, weight, indices, original, values, kTakesFloat64);
  check_adamw_numbers(op, step, lr, beta1, beta2, eps, weight_decay);
  if (values.numel() == 0) return;
  const DeviceGuard guard(values.get_device_index());
  const Tensor base = written ? torch::stable::contiguous(*original) : values;
  AdamWArguments a = {};
  a.state = adamw_state(values, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay);
  if (written) {
    a.target = target_of(*weight, *indices);
    a.original = stream_of(base);
  }
  launch(
      op, grid_of_entries(values.numel()), sparse_adamw_kernel, a,
      {{"values", values, Access::write},
       {"grad", grad},
       {"exp_avg", exp_avg, Access::write},
       {"exp_avg_sq", exp_avg_sq, Access::write},
       {"weight", written ? *weight : values, Access::write},
       {"indices", written ? *indices : values},
       {"original", base}});
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("scatter_write_", TORCH_BOX(&peft_kernels::scatter_write_));
  m.impl("scatter_accumulate_", TORCH_BOX(&peft_kernels::scatter_accumulate_));
  m.impl("sparse_adamw_", TORCH_BOX(&peft_kernels::sparse_adamw_));
}
