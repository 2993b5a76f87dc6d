// What the LoRA operators on the CPU ask of their arguments. A message names the operator and the argument, what was
// expected and what came.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "../common/describe.h"
#include "lora_products.h"

namespace peft_kernels {

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

inline DType activation_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16, float16 or float64, got ", described(tensor));
  }
  return DType::f32;
}

inline void check_matrix(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2, op, ": ", name, " must be 2-D, got ", shape_of(tensor));
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU like the other arguments");
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
  check_matrix(op, name, tensor);
  STD_TORCH_CHECK(
      tensor.size(0) == rows && tensor.size(1) == columns, op, ": ", name, " must be [", rows, ", ", columns, "], got ",
      shape_of(tensor));
}

// `activations` names the argument whose dtype it is.
inline void check_dtype(
    const char* op, const char* name, const Tensor& tensor, const char* activations, ScalarType dtype) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype, op, ": ", name, " must have ", activations, "'s dtype, ", dtype_name(dtype),
      ", got ", described(tensor));
}

inline void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t columns, ScalarType dtype) {
  if (!bias.has_value()) return;
  STD_TORCH_CHECK(
      bias->dim() == 1 && bias->size(0) == columns && bias->scalar_type() == dtype && bias->is_cpu(), op,
      ": bias must be [", columns, "] in x's dtype, ", dtype_name(dtype), ", got ", described(*bias));
}

// hidden and grad_hidden: [rows, rank] in the accumulation dtype of the activations.
inline int64_t check_hidden(const char* op, const Tensor& hidden, int64_t rows, DType dtype) {
  check_matrix(op, "hidden", hidden);
  STD_TORCH_CHECK(
      hidden.size(0) == rows && hidden.size(1) >= 1, op, ": hidden must be [", rows, ", rank >= 1], got ",
      shape_of(hidden));
  STD_TORCH_CHECK(
      hidden.scalar_type() == accumulation_type(dtype), op, ": hidden must be ",
      dtype == DType::f64 ? "float64" : "float32", " for these activations, got ", described(hidden));
  return hidden.size(1);
}

inline void check_factor_dtype(const char* op, const char* name, const Tensor& factor, DType dtype) {
  const DType own = activation_dtype(op, name, factor);
  STD_TORCH_CHECK(
      (own == DType::f64) == (dtype == DType::f64), op, ": ", name,
      " must be float64 if and only if the activations are, got ", described(factor));
}

inline void check_factor(const char* op, const char* name, const Tensor& factor, int64_t columns, DType dtype) {
  check_matrix(op, name, factor);
  STD_TORCH_CHECK(
      factor.size(1) == columns && factor.size(0) >= 1, op, ": ", name, " must be [rank >= 1, ", columns, "], got ",
      shape_of(factor));
  check_factor_dtype(op, name, factor, dtype);
}

inline Dropout make_dropout(const char* op, double dropout_p, const std::optional<Tensor>& rng_state) {
  Dropout dropout;
  STD_TORCH_CHECK(
      dropout_p >= 0.0 && dropout_p <= 1.0, op, ": dropout_p must be a probability in [0, 1], got ", dropout_p);
  if (dropout_p == 0.0) return dropout;
  STD_TORCH_CHECK(rng_state.has_value(), op, ": rng_state is needed when dropout_p > 0");
  STD_TORCH_CHECK(
      rng_state->scalar_type() == ScalarType::Long && rng_state->dim() == 1 && rng_state->size(0) == 2 &&
          rng_state->is_cpu(),
      op, ": rng_state must be int64 [2] (seed, offset) on the CPU, got ", described(*rng_state),
      rng_state->is_cpu() ? "" : " elsewhere");
  const Tensor state = rng_state->is_contiguous() ? *rng_state : torch::stable::contiguous(*rng_state);
  const int64_t* words = state.const_data_ptr<int64_t>();
  dropout.active = true;
  dropout.state = {words[0], words[1]};
  dropout.threshold = dropout_threshold(dropout_p);
  dropout.scale = dropout_scale(dropout_p);
  return dropout;
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

}  // namespace peft_kernels
