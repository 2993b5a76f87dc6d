// What the LoRA operators ask of their arguments, on every device, before anything runs. A message names the operator
// and the argument, what was expected and what came. `like` is the activations' tensor, whose dtype and device the
// others follow.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "describe.h"

namespace peft_kernels {

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(
      tensor.device() == like.device(), op, ": ", name, " must be on ", device_name(like),
      " like the other arguments, got ", described(tensor));
}

inline void check_matrix(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == 2, op, ": ", name, " must be 2-D, got ", described(tensor));
  check_device(op, name, tensor, like);
}

inline bool is_floating(ScalarType dtype, bool takes_float64) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         (takes_float64 && dtype == ScalarType::Double);
}

inline const char* floating_names(bool takes_float64) {
  return takes_float64 ? "float32, bfloat16, float16 or float64" : "float32, bfloat16 or float16";
}

inline void check_activations(const char* op, const char* name, const Tensor& tensor, bool takes_float64) {
  check_matrix(op, name, tensor, tensor);
  STD_TORCH_CHECK(
      is_floating(tensor.scalar_type(), takes_float64), op, ": ", name, " must be ", floating_names(takes_float64),
      ", got ", described(tensor));
}

inline void check_shape(
    const char* op, const char* name, const Tensor& tensor, int64_t rows, int64_t columns, const Tensor& like) {
  check_matrix(op, name, tensor, like);
  STD_TORCH_CHECK(
      tensor.size(0) == rows && tensor.size(1) == columns, op, ": ", name, " must be [", rows, ", ", columns, "], got ",
      described(tensor));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must have the activations' dtype, ",
      dtype_name(like.scalar_type()), ", got ", described(tensor));
}

inline void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t columns, const Tensor& like) {
  if (!bias.has_value()) return;
  STD_TORCH_CHECK(
      bias->dim() == 1 && bias->size(0) == columns && bias->scalar_type() == like.scalar_type(), op, ": bias must be [",
      columns, "] in the activations' dtype, ", dtype_name(like.scalar_type()), ", got ", described(*bias));
  check_device(op, "bias", *bias, like);
}

// The right operand [C_in, C_out] of a product with x [M, C_in].
inline void check_inner(const char* op, const Tensor& matrix, const Tensor& x) {
  check_matrix(op, "matrix", matrix, x);
  STD_TORCH_CHECK(
      matrix.size(0) == x.size(1), op, ": matrix must be [", x.size(1), ", C_out], got ", described(matrix));
  check_dtype(op, "matrix", matrix, x);
}

inline ScalarType accumulation_dtype(ScalarType activations) {
  return activations == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// hidden and grad_hidden: [rows, rank] in the accumulation dtype of the activations. Returns the rank.
inline int64_t check_hidden(const char* op, const Tensor& hidden, int64_t rows, const Tensor& like) {
  check_matrix(op, "hidden", hidden, like);
  STD_TORCH_CHECK(
      hidden.size(0) == rows && hidden.size(1) >= 1, op, ": hidden must be [", rows, ", rank >= 1], got ",
      described(hidden));
  const ScalarType dtype = accumulation_dtype(like.scalar_type());
  STD_TORCH_CHECK(
      hidden.scalar_type() == dtype, op, ": hidden must be ", dtype_name(dtype), " for these activations, got ",
      described(hidden));
  return hidden.size(1);
}

inline void check_factor_dtype(const char* op, const char* name, const Tensor& factor, const Tensor& like) {
  const bool float64 = like.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(
      is_floating(factor.scalar_type(), true), op, ": ", name, " must be ", floating_names(float64), ", got ",
      described(factor));
  STD_TORCH_CHECK(
      (factor.scalar_type() == ScalarType::Double) == float64, op, ": ", name,
      " must be float64 if and only if the activations are, got ", described(factor));
}

inline void check_factor(const char* op, const char* name, const Tensor& factor, int64_t columns, const Tensor& like) {
  check_matrix(op, name, factor, like);
  STD_TORCH_CHECK(
      factor.size(1) == columns && factor.size(0) >= 1, op, ": ", name, " must be [rank >= 1, ", columns, "], got ",
      described(factor));
  check_factor_dtype(op, name, factor, like);
}

inline void check_rank(const char* op, const char* name, const Tensor& factor, int64_t rank) {
  STD_TORCH_CHECK(
      factor.size(0) == rank, op, ": ", name, " must have hidden's rank ", rank, ", got ", described(factor));
}

// The dtype that a caller asks of a gradient.
inline void check_grad_dtype(const char* op, ScalarType dtype, bool takes_float64) {
  STD_TORCH_CHECK(
      is_floating(dtype, takes_float64), op, ": dtype must be ", floating_names(takes_float64), ", got ",
      dtype_name(dtype));
}

// Philox counts rows, and groups of eight columns, with 32 bits.
inline void check_mask_size(const char* op, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, op, ": rows and columns must not be negative, got ", rows, ", ", columns);
  STD_TORCH_CHECK(rows <= int64_t{1} << 32, op, ": dropout needs at most 2^32 rows, got ", rows);
}

inline void check_rng_state(const char* op, const Tensor& rng_state, const Tensor& like) {
  STD_TORCH_CHECK(
      rng_state.scalar_type() == ScalarType::Long && rng_state.dim() == 1 && rng_state.size(0) == 2, op,
      ": rng_state must be int64 [2] (seed, offset), got ", described(rng_state));
  check_device(op, "rng_state", rng_state, like);
}

// Whether there is dropout. `rows` by `columns` is the matrix it applies to.
inline bool check_dropout(
    const char* op, double dropout_p, const std::optional<Tensor>& rng_state, int64_t rows, int64_t columns,
    const Tensor& like) {
  STD_TORCH_CHECK(  // written so that NaN fails
      dropout_p >= 0.0 && dropout_p <= 1.0, op, ": dropout_p must be a probability in [0, 1], got ", dropout_p);
  if (dropout_p == 0.0) return false;
  check_mask_size(op, rows, columns);
  STD_TORCH_CHECK(rng_state.has_value(), op, ": rng_state must be given when dropout_p > 0, got None");
  check_rng_state(op, *rng_state, like);
  return true;
}

// Whether two elements of a matrix share memory: by the order of its strides, exact for everything views produce.
inline bool overlaps_itself(const Tensor& tensor) {
  const int64_t row = tensor.stride(0), column = tensor.stride(1);
  if (tensor.size(0) <= 1 || tensor.size(1) <= 1) {
    return (tensor.size(0) > 1 && row == 0) || (tensor.size(1) > 1 && column == 0);
  }
  return row >= column ? column < 1 || row <= (tensor.size(1) - 1) * column
                       : row < 1 || column <= (tensor.size(0) - 1) * row;
}

inline void check_apart(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.numel() == 0 || !overlaps_itself(tensor), op, ": ", name,
      " is written in place and must not overlap itself in memory, got ", described(tensor), " with strides [",
      tensor.stride(0), ", ", tensor.stride(1), "]");
}

// The arguments of the whole layer, forward: x [M, K].
inline void check_forward(
    const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_a,
    const Tensor& lora_b) {
  check_matrix(op, "weight", weight, x);
  STD_TORCH_CHECK(weight.size(1) == x.size(1), op, ": weight must be [N, ", x.size(1), "], got ", described(weight));
  check_dtype(op, "weight", weight, x);
  check_bias(op, bias, weight.size(0), x);
  check_factor(op, "lora_a", lora_a, x.size(1), x);
  check_shape(op, "lora_b", lora_b, weight.size(0), lora_a.size(0), x);
  check_factor_dtype(op, "lora_b", lora_b, x);
}

// And backward: grad_out [M, N].
inline void check_backward(
    const char* op, const Tensor& grad_out, const std::optional<Tensor>& x, const Tensor& weight, const Tensor& lora_a,
    const Tensor& lora_b, const Tensor& hidden, bool need_a) {
  const int64_t rows = grad_out.size(0), out_features = grad_out.size(1);
  check_matrix(op, "weight", weight, grad_out);
  STD_TORCH_CHECK(
      weight.size(0) == out_features, op, ": weight must be [", out_features, ", K], got ", described(weight));
  check_dtype(op, "weight", weight, grad_out);
  STD_TORCH_CHECK(x.has_value() || !need_a, op, ": x must be given for the gradient of lora_a, got None");
  if (x.has_value()) {
    check_shape(op, "x", *x, rows, weight.size(1), grad_out);
    check_dtype(op, "x", *x, grad_out);
  }
  check_factor(op, "lora_a", lora_a, weight.size(1), grad_out);
  check_shape(op, "lora_b", lora_b, out_features, lora_a.size(0), grad_out);
  check_factor_dtype(op, "lora_b", lora_b, grad_out);
  const int64_t rank = check_hidden(op, hidden, rows, grad_out);
  STD_TORCH_CHECK(
      rank == lora_a.size(0), op, ": hidden must have lora_a's rank ", lora_a.size(0), ", got ", described(hidden));
}

}  // namespace peft_kernels
