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

// A list of positions.
inline void check_positions(const char* op, const char* name, const Tensor& positions, const Tensor& like) {
  STD_TORCH_CHECK(
      positions.scalar_type() == ScalarType::Int || positions.scalar_type() == ScalarType::Long, op, ": ", name,
      " must be int32 or int64, got ", described(positions));
  STD_TORCH_CHECK(positions.dim() == 1, op, ": ", name, " must be 1-D, got ", described(positions));
  check_device(op, name, positions, like);
  check_contiguous(op, name, positions);
}

// Returns how many entries there are.
inline int64_t check_indices(const char* op, const Tensor& indices, const Tensor& weight) {
  check_positions(op, "indices", indices, weight);
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

// The state of SM3: one maximum for each row and each column of the weight.
inline void check_maxima(const char* op, const char* name, const Tensor& maxima, const Tensor& values) {
  STD_TORCH_CHECK(maxima.dim() == 1, op, ": ", name, " must be 1-D, got ", described(maxima));
  STD_TORCH_CHECK(
      maxima.scalar_type() == values.scalar_type(), op, ": ", name, " must have values' dtype, ",
      dtype_name(values.scalar_type()), ", got ", described(maxima));
  check_device(op, name, maxima, values);
  check_contiguous(op, name, maxima);
}

// Returns how many entries there are.
inline int64_t check_sm3(
    const char* op, const Tensor& values, const Tensor& grad, const Tensor& row_max, const Tensor& column_max,
    const std::optional<Tensor>& exp_avg, const std::optional<Tensor>& weight, const Tensor& indices,
    const std::optional<Tensor>& original, bool takes_float64) {
  STD_TORCH_CHECK(values.dim() == 1, op, ": values must be 1-D, got ", described(values));
  check_values(op, values, values.numel(), values, takes_float64);
  check_contiguous(op, "values", values);
  check_like_values(op, "grad", grad, values);
  check_maxima(op, "row_max", row_max, values);
  check_maxima(op, "column_max", column_max, values);
  if (exp_avg.has_value()) check_like_values(op, "exp_avg", *exp_avg, values);
  check_positions(op, "indices", indices, values);
  const int64_t rows = row_max.numel(), columns = column_max.numel();
  STD_TORCH_CHECK(
      indices.numel() == values.numel(), op, ": indices must be [", values.numel(), "], as many as values, got ",
      described(indices));
  STD_TORCH_CHECK(
      indices.numel() <= rows * columns, op, ": indices must be at most N K = ", rows * columns, " positions, got ",
      described(indices));
  STD_TORCH_CHECK(
      weight.has_value() == original.has_value(), op, ": ", weight.has_value() ? "original" : "weight",
      " must be given with ", weight.has_value() ? "weight" : "original", ", got None");
  if (weight.has_value()) {
    check_weight(op, *weight, values, takes_float64);
    STD_TORCH_CHECK(
        weight->numel() == rows * columns, op, ": weight must have N K = ", rows * columns,
        " elements, as row_max and column_max say, got ", described(*weight));
    check_original(op, *original, values.numel(), *weight);
  }
  return values.numel();
}

inline void check_sm3_numbers(const char* op, double lr, double beta, double eps, double weight_decay) {
  check_not_negative(op, "lr", lr);
  check_beta(op, "beta", beta);
  check_not_negative(op, "eps", eps);
  check_not_negative(op, "weight_decay", weight_decay);
}

// Two sorted arrays of one dtype.
inline void check_sorted_pair(
    const char* op, const char* name, const Tensor& first, const char* other_name, const Tensor& other) {
  check_positions(op, name, first, first);
  check_positions(op, other_name, other, first);
  STD_TORCH_CHECK(
      other.scalar_type() == first.scalar_type(), op, ": ", other_name, " must have the dtype of ", name, ", ",
      dtype_name(first.scalar_type()), ", got ", described(other));
}

// The factors of an outer product; their numbers are checked where they are read.
inline void check_outer_product(
    const char* op, const Tensor& rows, const Tensor& columns, int64_t count, const Tensor& exclude,
    bool takes_float64) {
  STD_TORCH_CHECK(
      rows.scalar_type() == ScalarType::Float || (takes_float64 && rows.scalar_type() == ScalarType::Double), op,
      ": rows must be ", takes_float64 ? "float32 or float64" : "float32", ", got ", described(rows));
  STD_TORCH_CHECK(rows.dim() == 1, op, ": rows must be 1-D, got ", described(rows));
  STD_TORCH_CHECK(
      columns.scalar_type() == rows.scalar_type(), op, ": columns must have rows' dtype, ",
      dtype_name(rows.scalar_type()), ", got ", described(columns));
  STD_TORCH_CHECK(columns.dim() == 1, op, ": columns must be 1-D, got ", described(columns));
  check_device(op, "columns", columns, rows);
  check_positions(op, "exclude", exclude, rows);
  const int64_t entries = rows.numel() * columns.numel();
  STD_TORCH_CHECK(
      exclude.numel() <= entries, op, ": exclude must be at most N K = ", entries, " positions, got ",
      described(exclude));
  STD_TORCH_CHECK(
      count >= 0 && count <= entries - exclude.numel(), op, ": count must be in [0, ", entries - exclude.numel(),
      "], the entries that are not excluded, got ", count);
}

inline void check_product_above(
    const char* op, const Tensor& grad_out, const Tensor& x, double threshold, int64_t capacity, bool takes_float64) {
  check_activations(op, "grad_out", grad_out, takes_float64);
  check_matrix(op, "x", x, grad_out);
  check_dtype(op, "x", x, grad_out);
  STD_TORCH_CHECK(x.size(0) == grad_out.size(0), op, ": x must be [", grad_out.size(0), ", K], got ", described(x));
  check_not_negative(op, "threshold", threshold);
  STD_TORCH_CHECK(capacity >= 0, op, ": capacity must be at least 0, got ", capacity);
}

}  // namespace peft_kernels
