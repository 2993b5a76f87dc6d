// What the operators of sparse deltas ask of their arguments, on every device, before anything runs; in the words of
// lora_checks.h. `like` is the tensor that is changed, whose device the others follow. That indices are sorted, unique
// and in range is not checked here: it takes a pass over them, and is checked once, where they are installed.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "lora_checks.h"

namespace peft_kernels {

inline std::string strides_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.stride(d));
  return text + "]";
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.is_contiguous(), op, ": ", name, " must be contiguous, got ", described(tensor), " with strides ",
      strides_of(tensor));
}

inline void check_floating(const char* op, const char* name, const Tensor& tensor, bool takes_float64) {
  STD_TORCH_CHECK(
      is_floating(tensor.scalar_type(), takes_float64), op, ": ", name, " must be ", floating_names(takes_float64),
      ", got ", described(tensor));
}

inline void check_weight(const char* op, const Tensor& weight, const Tensor& like, bool takes_float64) {
  check_floating(op, "weight", weight, takes_float64);
  check_device(op, "weight", weight, like);
  check_contiguous(op, "weight", weight);
}

// Returns how many entries there are.
inline int64_t check_indices(const char* op, const Tensor& indices, const Tensor& weight) {
  STD_TORCH_CHECK(
      indices.scalar_type() == ScalarType::Int || indices.scalar_type() == ScalarType::Long, op,
      ": indices must be int32 or int64, got ", described(indices));
  STD_TORCH_CHECK(indices.dim() == 1, op, ": indices must be 1-D, got ", described(indices));
  check_device(op, "indices", indices, weight);
  check_contiguous(op, "indices", indices);
  STD_TORCH_CHECK(
      indices.numel() <= weight.numel(), op, ": indices must be at most as many as weight has elements, ",
      weight.numel(), ", got ", described(indices));
  return indices.numel();
}

inline void check_entries(const char* op, const char* name, const Tensor& tensor, int64_t count, const Tensor& like) {
  STD_TORCH_CHECK(
      tensor.dim() == 1 && tensor.size(0) == count, op, ": ", name, " must be [", count,
      "], as many as the others, got ", described(tensor));
  check_device(op, name, tensor, like);
}

inline void check_original(const char* op, const Tensor& original, int64_t count, const Tensor& weight) {
  check_entries(op, "original", original, count, weight);
  STD_TORCH_CHECK(
      original.scalar_type() == weight.scalar_type(), op, ": original must have weight's dtype, ",
      dtype_name(weight.scalar_type()), ", got ", described(original));
}

inline void check_values(const char* op, const Tensor& values, int64_t count, const Tensor& like, bool takes_float64) {
  check_floating(op, "values", values, takes_float64);
  check_entries(op, "values", values, count, like);
}

// The gradient and the moments of values.
inline void check_like_values(const char* op, const char* name, const Tensor& tensor, const Tensor& values) {
  check_entries(op, name, tensor, values.numel(), values);
  STD_TORCH_CHECK(
      tensor.scalar_type() == values.scalar_type(), op, ": ", name, " must have values' dtype, ",
      dtype_name(values.scalar_type()), ", got ", described(tensor));
  check_contiguous(op, name, tensor);
}

// Where the result of a step is written: all three or none. Returns whether it is written.
inline bool check_write_back(
    const char* op, const std::optional<Tensor>& weight, const std::optional<Tensor>& indices,
    const std::optional<Tensor>& original, const Tensor& values, bool takes_float64) {
  if (!weight.has_value()) {
    STD_TORCH_CHECK(
        !indices.has_value() && !original.has_value(), op,
        ": weight must be given with indices and original, got None");
    return false;
  }
  STD_TORCH_CHECK(indices.has_value(), op, ": indices must be given with weight, got None");
  STD_TORCH_CHECK(original.has_value(), op, ": original must be given with weight, got None");
  check_weight(op, *weight, values, takes_float64);
  const int64_t count = check_indices(op, *indices, *weight);
  STD_TORCH_CHECK(
      count == values.numel(), op, ": indices must be [", values.numel(), "], as many as values, got ",
      described(*indices));
  check_original(op, *original, count, *weight);
  return true;
}

inline void check_not_negative(const char* op, const char* name, double value) {
  STD_TORCH_CHECK(value >= 0.0, op, ": ", name, " must be at least 0, got ", value);  // written so that NaN fails
}

inline void check_beta(const char* op, const char* name, double value) {
  STD_TORCH_CHECK(value >= 0.0 && value < 1.0, op, ": ", name, " must be in [0, 1), got ", value);
}

inline void check_adamw_numbers(
    const char* op, int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay) {
  STD_TORCH_CHECK(step >= 1, op, ": step must be at least 1, got ", step);
  check_not_negative(op, "lr", lr);
  check_beta(op, "beta1", beta1);
  check_beta(op, "beta2", beta2);
  check_not_negative(op, "eps", eps);
  check_not_negative(op, "weight_decay", weight_decay);
}

}  // namespace peft_kernels
