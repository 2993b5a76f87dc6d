// What the operators of kept tokens ask of their arguments, on every device, before anything runs; in the words of
// lora_checks.h. What the rows are is not looked at here: on a GPU nobody could without waiting for it.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "sparse_checks.h"

namespace peft_kernels {

// Rows [S] of some matrix. Returns how many entries there are.
inline int64_t check_rows(const char* op, const Tensor& rows, const Tensor& like) {
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Int, op, ": rows must be int32, got ", described(rows));
  STD_TORCH_CHECK(rows.dim() == 1, op, ": rows must be 1-D, got ", described(rows));
  check_device(op, "rows", rows, like);
  return rows.numel();
}

// values [S, C] for rows of a target [M, C], which has been checked. Returns S.
inline int64_t check_row_values(const char* op, const Tensor& target, const Tensor& values, const Tensor& rows) {
  const int64_t count = check_rows(op, rows, target);
  check_shape(op, "values", values, count, target.size(1), target);
  check_dtype(op, "values", values, target);
  return count;
}

// That values [S, C] share nothing with out [M, C], which is written: rows would be read when others have changed them.
// What lies between the first byte of a matrix and its last one counts as its own.
inline void check_values_apart(const char* op, const Tensor& values, const Tensor& out) {
  if (values.numel() == 0 || out.numel() == 0) return;
  const auto begin = [](const Tensor& tensor) { return static_cast<const char*>(tensor.const_data_ptr()); };
  const auto end = [&](const Tensor& tensor) {
    const int64_t last = (tensor.size(0) - 1) * tensor.stride(0) + (tensor.size(1) - 1) * tensor.stride(1);
    return begin(tensor) + (last + 1) * tensor.element_size();
  };
  STD_TORCH_CHECK(
      end(values) <= begin(out) || end(out) <= begin(values), op,
      ": values must share no memory with out, which is written in place, got ", described(values), " for ",
      described(out));
}

// The weight [H] of a norm, in a dtype of its own.
inline void check_norm_weight(
    const char* op, const Tensor& weight, int64_t columns, const Tensor& like, bool takes_float64) {
  STD_TORCH_CHECK(
      weight.dim() == 1 && weight.size(0) == columns, op, ": weight must be [", columns, "], got ", described(weight));
  check_floating(op, "weight", weight, takes_float64);
  check_device(op, "weight", weight, like);
}

// 1 / sqrt(mean(x^2) + eps) of `count` rows, in the accumulation dtype of the activations.
inline void check_rstd(const char* op, const Tensor& rstd, int64_t count, const Tensor& like) {
  const ScalarType dtype = accumulation_dtype(like.scalar_type());
  STD_TORCH_CHECK(
      rstd.dim() == 1 && rstd.size(0) == count && rstd.scalar_type() == dtype, op, ": rstd must be ", dtype_name(dtype),
      " [", count, "], got ", described(rstd));
  check_device(op, "rstd", rstd, like);
}

// x [M, H] for gather_rms_norm. Returns the rows of the result.
inline int64_t check_rms_norm(
    const char* op, const Tensor& x, const std::optional<Tensor>& rows, const Tensor& weight, bool takes_float64) {
  check_activations(op, "x", x, takes_float64);
  const int64_t count = rows.has_value() ? check_rows(op, *rows, x) : x.size(0);
  check_norm_weight(op, weight, x.size(1), x, takes_float64);
  return count;
}

// kept [S, H] and what it is normalized by.
inline void check_kept(
    const char* op, const Tensor& kept, const Tensor& rstd, const Tensor& weight, bool takes_float64) {
  check_activations(op, "kept", kept, takes_float64);
  check_rstd(op, rstd, kept.size(0), kept);
  check_norm_weight(op, weight, kept.size(1), kept, takes_float64);
}

inline void check_rms_norm_backward(
    const char* op, const std::optional<Tensor>& grad_residual, const Tensor& grad_h, const Tensor& kept,
    const Tensor& rstd, const Tensor& weight, const std::optional<Tensor>& rows, int64_t total, bool takes_float64) {
  check_kept(op, kept, rstd, weight, takes_float64);
  const int64_t count = kept.size(0), columns = kept.size(1);
  check_shape(op, "grad_h", grad_h, count, columns, kept);
  check_dtype(op, "grad_h", grad_h, kept);
  STD_TORCH_CHECK(total >= 0, op, ": total must be at least 0, got ", total);
  if (rows.has_value()) {
    STD_TORCH_CHECK(
        check_rows(op, *rows, kept) == count, op, ": rows must be [", count, "], as many as kept has, got ",
        described(*rows));
  } else {
    STD_TORCH_CHECK(total == count, op, ": total must be ", count, ", kept's rows, without rows, got ", total);
  }
  if (!grad_residual.has_value()) return;
  check_shape(op, "grad_residual", *grad_residual, total, columns, kept);
  check_dtype(op, "grad_residual", *grad_residual, kept);
}

inline void check_angles(const char* op, const char* name, const Tensor& angles, const Tensor& x, bool takes_float64) {
  check_matrix(op, name, angles, x);
  check_floating(op, name, angles, takes_float64);
  STD_TORCH_CHECK(
      angles.size(1) % 2 == 0 && angles.size(1) <= x.size(2), op, ": ", name,
      " must be [P, R] with R even and at most ", x.size(2), ", got ", described(angles));
}

// x [S, heads, D].
inline void check_rope(
    const char* op, const Tensor& x, const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& rows,
    bool takes_float64) {
  STD_TORCH_CHECK(x.dim() == 3, op, ": x must be [S, heads, D], got ", described(x));
  check_floating(op, "x", x, takes_float64);
  check_angles(op, "cos", cos, x, takes_float64);
  check_angles(op, "sin", sin, x, takes_float64);
  STD_TORCH_CHECK(
      sin.size(0) == cos.size(0) && sin.size(1) == cos.size(1) && sin.scalar_type() == cos.scalar_type(), op,
      ": sin must be like cos, ", described(cos), ", got ", described(sin));
  const int64_t count = rows.has_value() ? check_rows(op, *rows, x) : cos.size(0);
  STD_TORCH_CHECK(
      x.size(0) == count, op, ": x must be [", count, ", heads, D], as many tokens as ",
      rows.has_value() ? "rows" : "cos", ", got ", described(x));
}

// x [M, K], or [S, K] gathered; weight [N, K], or [K, N] transposed. Returns S.
inline int64_t check_gather_linear_scatter(
    const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& rows,
    const std::optional<Tensor>& residual, bool gather, bool transposed, bool takes_float64) {
  check_activations(op, "x", x, takes_float64);
  const int64_t count = check_rows(op, rows, x);
  STD_TORCH_CHECK(
      gather || x.size(0) == count, op, ": x must be [", count, ", K], gathered as rows are, got ", described(x));
  check_matrix(op, "weight", weight, x);
  STD_TORCH_CHECK(
      weight.size(transposed ? 0 : 1) == x.size(1), op, ": weight must be ", transposed ? "[" : "[N, ", x.size(1),
      transposed ? ", N]" : "]", ", got ", described(weight));
  check_dtype(op, "weight", weight, x);
  const int64_t columns = weight.size(transposed ? 1 : 0);
  check_bias(op, bias, columns, x);
  if (residual.has_value()) {
    check_matrix(op, "residual", *residual, x);
    STD_TORCH_CHECK(
        residual->size(1) == columns && (!gather || residual->size(0) == x.size(0)), op, ": residual must be [",
        gather ? std::to_string(x.size(0)) : "M", ", ", columns, "], got ", described(*residual));
    check_dtype(op, "residual", *residual, x);
  }
  return count;
}

}  // namespace peft_kernels
