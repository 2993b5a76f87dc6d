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

#include <cmath>
#include <optional>

#include "../common/sparse_checks.h"
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
#pragma unroll
    for (int i = 0; i < kThreadEntries; ++i) {
      if (i >= range.count) continue;
      if (a.target.dtype == DType::float32) {
        static_cast<uint32_t*>(a.target.weight)[positions[i]] = original.words[i];
      } else {
        static_cast<uint16_t*>(a.target.weight)[positions[i]] =
            static_cast<uint16_t>(original.words[i / 2] >> i % 2 * 16);
      }
    }
    return;
  }
  unpack(values, a.values.dtype, delta);
  write_sums(a.target, range, positions, before, a.factor, delta);
}

struct AdamWArguments {
  Stream values, grad, exp_avg, exp_avg_sq;
  Stream original;
  DeltaTarget target;  // weight null: nothing is written back
  int64_t count;
  float decay;                 // 1 - lr weight_decay
  float first_weight;          // 1 - beta1
  float beta2, second_weight;  // and 1 - beta2
  float eps;
  float step_size;           // lr / (1 - beta1^step)
  float root_of_correction;  // sqrt(1 - beta2^step)
};

__global__ void __launch_bounds__(kEntryThreads) sparse_adamw_kernel(const __grid_constant__ AdamWArguments a) {
  const EntryRange range = entries_of_thread(a.count);
  if (range.count == 0) return;
  const bool written = a.target.weight != nullptr;
  int64_t positions[kThreadEntries] = {};
  PackedEntries original = {};
  if (written) {
    load_positions(a.target, range, positions);
    original = load_packed(a.original, range);
  }
  const PackedEntries packed_values = load_packed(a.values, range), packed_grad = load_packed(a.grad, range);
  const PackedEntries packed_first = load_packed(a.exp_avg, range);
  const PackedEntries packed_second = load_packed(a.exp_avg_sq, range);
  float values[kThreadEntries], grad[kThreadEntries], first[kThreadEntries], second[kThreadEntries];
  unpack(packed_values, a.values.dtype, values);
  unpack(packed_grad, a.grad.dtype, grad);
  unpack(packed_first, a.exp_avg.dtype, first);
  unpack(packed_second, a.exp_avg_sq.dtype, second);
  // As torch interpolates: from the nearer end, so that a weight of 1 gives the gradient itself.
  const bool from_average = a.first_weight < 0.5f;
  const float slope = from_average ? a.first_weight : a.first_weight - 1.0f;
#pragma unroll
  for (int i = 0; i < kThreadEntries; ++i) {
    const float g = grad[i], average = first[i];
    first[i] = (from_average ? average : g) + slope * (g - average);
    second[i] = second[i] * a.beta2 + a.second_weight * g * g;
    const float denominator = sqrtf(second[i]) / a.root_of_correction + a.eps;
    values[i] = values[i] * a.decay - a.step_size * first[i] / denominator;
  }
  store_packed(a.exp_avg, range, pack(a.exp_avg.dtype, first));
  store_packed(a.exp_avg_sq, range, pack(a.exp_avg_sq.dtype, second));
  const PackedEntries rounded = pack(a.values.dtype, values);
  store_packed(a.values, range, rounded);
  if (!written) return;
  float before[kThreadEntries];
  unpack(original, a.target.dtype, before);
  unpack(rounded, a.values.dtype, values);  // what the parameter holds is what the weight gets, in 16-bit values too
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
  a.values = stream_of(values, values.mutable_data_ptr());
  a.grad = stream_of(grad);
  a.exp_avg = stream_of(exp_avg, exp_avg.mutable_data_ptr());
  a.exp_avg_sq = stream_of(exp_avg_sq, exp_avg_sq.mutable_data_ptr());
  if (written) {
    a.target = target_of(*weight, *indices);
    a.original = stream_of(base);
  }
  a.count = values.numel();
  const auto steps = static_cast<double>(step);
  a.decay = static_cast<float>(1.0 - lr * weight_decay);
  a.first_weight = static_cast<float>(1.0 - beta1);
  a.beta2 = static_cast<float>(beta2);
  a.second_weight = static_cast<float>(1.0 - beta2);
  a.eps = static_cast<float>(eps);
  a.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, steps)));
  a.root_of_correction = static_cast<float>(std::sqrt(1.0 - std::pow(beta2, steps)));
  launch(
      op, grid_of_entries(a.count), sparse_adamw_kernel, a,
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
