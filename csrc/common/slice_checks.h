// What the operators of slices of channels ask of their arguments, on every device, before anything runs; in the words
// of lora_checks.h. That channels are sorted, unique and in range is not checked here: it takes a pass over them, and
// is checked once, where they are installed.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "sparse_checks.h"

namespace peft_kernels {

// Some of `channels` channels. Returns how many.
inline int64_t check_channels(
    const char* op, const char* name, const Tensor& indices, int64_t channels, const Tensor& like) {
  STD_TORCH_CHECK(
      indices.scalar_type() == ScalarType::Long, op, ": ", name, " must be int64, got ", described(indices));
  STD_TORCH_CHECK(indices.dim() == 1, op, ": ", name, " must be 1-D, got ", described(indices));
  check_device(op, name, indices, like);
  check_contiguous(op, name, indices);
  STD_TORCH_CHECK(
      indices.numel() <= channels, op, ": ", name, " must be at most as many as there are channels, ", channels,
      ", got ", described(indices));
  return indices.numel();
}
inline int64_t check_channels(const char* op, const Tensor& indices, int64_t channels, const Tensor& like) {
  return check_channels(op, "indices", indices, channels, like);
}

// grad_out [M, A] has been checked; x [M, B] and channels of grad_out follow it. Returns the rows of the result.
inline int64_t check_slice_grad(
    const char* op, const Tensor& grad_out, const Tensor& x, const std::optional<Tensor>& indices) {
  check_matrix(op, "x", x, grad_out);
  check_dtype(op, "x", x, grad_out);
  const int64_t rows = grad_out.size(0), channels = grad_out.size(1);
  STD_TORCH_CHECK(x.size(0) == rows, op, ": x must be [", rows, ", B], got ", described(x));
  return indices.has_value() ? check_channels(op, *indices, channels, grad_out) : channels;
}

// values [N, s] at dim 1, [s, K] at dim 0, of a weight [N, K] that is written to.
inline void check_slice(
    const char* op, const char* name, const Tensor& weight, const Tensor& indices, const Tensor& values, int64_t dim,
    bool takes_float64) {
  check_weight(op, weight, weight, takes_float64);
  STD_TORCH_CHECK(weight.dim() == 2, op, ": weight must be 2-D, got ", described(weight));
  STD_TORCH_CHECK(dim == 0 || dim == 1, op, ": dim must be 0 or 1, got ", dim);
  const int64_t count = check_channels(op, indices, weight.size(dim), weight);
  check_floating(op, name, values, takes_float64);
  check_shape(op, name, values, dim == 0 ? count : weight.size(0), dim == 0 ? weight.size(1) : count, weight);
}

// A slice in the weight's dtype.
inline void check_bits_of_slice(
    const char* op, const char* name, const Tensor& weight, const Tensor& indices, const Tensor& values, int64_t dim,
    bool takes_float64) {
  check_slice(op, name, weight, indices, values, dim, takes_float64);
  STD_TORCH_CHECK(
      values.scalar_type() == weight.scalar_type(), op, ": ", name, " must have weight's dtype, ",
      dtype_name(weight.scalar_type()), ", got ", described(values));
}

inline void check_slice_exchange(
    const char* op, const Tensor& weight, const std::optional<Tensor>& held_indices, const std::optional<Tensor>& held,
    const Tensor& indices, const Tensor& change, const Tensor& original, int64_t dim, bool takes_float64) {
  check_slice(op, "change", weight, indices, change, dim, takes_float64);
  check_bits_of_slice(op, "original", weight, indices, original, dim, takes_float64);
  check_contiguous(op, "original", original);
  STD_TORCH_CHECK(
      held.has_value() == held_indices.has_value(), op, ": ", held.has_value() ? "held_indices" : "held",
      " must be given with ", held.has_value() ? "held" : "held_indices", ", got None");
  if (!held.has_value()) return;
  check_channels(op, "held_indices", *held_indices, weight.size(dim), weight);
  check_bits_of_slice(op, "held", weight, *held_indices, *held, dim, takes_float64);
}

// The gradient and the moments of a trainable slice.
inline void check_like_slice(const char* op, const char* name, const Tensor& tensor, const Tensor& trainable) {
  check_shape(op, name, tensor, trainable.size(0), trainable.size(1), trainable);
  STD_TORCH_CHECK(
      tensor.scalar_type() == trainable.scalar_type(), op, ": ", name, " must have trainable's dtype, ",
      dtype_name(trainable.scalar_type()), ", got ", described(tensor));
  check_contiguous(op, name, tensor);
}

// Returns whether the step is written into a weight.
inline bool check_slice_adamw(
    const char* op, const Tensor& trainable, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& indices, int64_t dim, bool takes_float64) {
  STD_TORCH_CHECK(trainable.dim() == 2, op, ": trainable must be 2-D, got ", described(trainable));
  check_floating(op, "trainable", trainable, takes_float64);
  check_contiguous(op, "trainable", trainable);
  check_like_slice(op, "grad", grad, trainable);
  check_like_slice(op, "exp_avg", exp_avg, trainable);
  check_like_slice(op, "exp_avg_sq", exp_avg_sq, trainable);
  STD_TORCH_CHECK(dim == 0 || dim == 1, op, ": dim must be 0 or 1, got ", dim);
  STD_TORCH_CHECK(
      weight.has_value() == indices.has_value(), op, ": ", weight.has_value() ? "indices" : "weight",
      " must be given with ", weight.has_value() ? "weight" : "indices", ", got None");
  if (weight.has_value()) check_slice(op, "trainable", *weight, *indices, trainable, dim, takes_float64);
  return weight.has_value();
}

// gate [M, K] has been checked; `name` is another matrix of its shape and dtype.
inline void check_like_gate(const char* op, const char* name, const Tensor& tensor, const Tensor& gate) {
  check_shape(op, name, tensor, gate.size(0), gate.size(1), gate);
  check_dtype(op, name, tensor, gate);
}

}  // namespace peft_kernels
