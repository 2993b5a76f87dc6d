// A step of AdamW on numbers that lie one after another, four neighbors to a thread: what sparse deltas and slices of
// channels share. As torch.optim.AdamW does it; formulas in peft_kernels/reference/sparse_delta.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>

#include "sparse_entries.h"

namespace peft_kernels {

struct AdamWState {
  Stream values, grad, exp_avg, exp_avg_sq;
  int64_t count;
  float decay;                 // 1 - lr weight_decay
  float first_weight;          // 1 - beta1
  float beta2, second_weight;  // and 1 - beta2
  float eps;
  float step_size;           // lr / (1 - beta1^step)
  float root_of_correction;  // sqrt(1 - beta2^step)
};

inline AdamWState adamw_state(
    const Tensor& values, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq, int64_t step, double lr,
    double beta1, double beta2, double eps, double weight_decay) {
  const auto steps = static_cast<double>(step);
  AdamWState state = {};
  state.values = stream_of(values, values.mutable_data_ptr());
  state.grad = stream_of(grad);
  state.exp_avg = stream_of(exp_avg, exp_avg.mutable_data_ptr());
  state.exp_avg_sq = stream_of(exp_avg_sq, exp_avg_sq.mutable_data_ptr());
  state.count = values.numel();
  state.decay = static_cast<float>(1.0 - lr * weight_decay);
  state.first_weight = static_cast<float>(1.0 - beta1);
  state.beta2 = static_cast<float>(beta2);
  state.second_weight = static_cast<float>(1.0 - beta2);
  state.eps = static_cast<float>(eps);
  state.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, steps)));
  state.root_of_correction = static_cast<float>(std::sqrt(1.0 - std::pow(beta2, steps)));
  return state;
}

// Steps the thread's entries and stores them with their moments; returns the values as memory holds them now.
__device__ __forceinline__ PackedEntries adamw_step(const AdamWState& state, const EntryRange& range) {
  const PackedEntries packed_values = load_packed(state.values, range), packed_grad = load_packed(state.grad, range);
  const PackedEntries packed_first = load_packed(state.exp_avg, range);
  const PackedEntries packed_second = load_packed(state.exp_avg_sq, range);
  float values[kThreadEntries], grad[kThreadEntries], first[kThreadEntries], second[kThreadEntries];
  unpack(packed_values, state.values.dtype, values);
  unpack(packed_grad, state.grad.dtype, grad);
  unpack(packed_first, state.exp_avg.dtype, first);
  unpack(packed_second, state.exp_avg_sq.dtype, second);
  // As torch interpolates: from the nearer end, so that a weight of 1 gives the gradient itself.
  const bool from_average = state.first_weight < 0.5f;
  const float slope = from_average ? state.first_weight : state.first_weight - 1.0f;
#pragma unroll
  for (int i = 0; i < kThreadEntries; ++i) {
    const float g = grad[i], average = first[i];
    first[i] = (from_average ? average : g) + slope * (g - average);
    second[i] = second[i] * state.beta2 + state.second_weight * g * g;
    const float denominator = sqrtf(second[i]) / state.root_of_correction + state.eps;
    values[i] = values[i] * state.decay - state.step_size * first[i] / denominator;
  }
  store_packed(state.exp_avg, range, pack(state.exp_avg.dtype, first));
  store_packed(state.exp_avg_sq, range, pack(state.exp_avg_sq.dtype, second));
  const PackedEntries rounded = pack(state.values.dtype, values);
  store_packed(state.values, range, rounded);
  return rounded;
}

}  // namespace peft_kernels
