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
inline int64_t check_gathered_product(
    const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& rows,
    bool gather, bool transposed, bool takes_float64) {
  check_activations(op, "x", x, takes_float64);
  const int64_t count = check_rows(op, rows, x);
  STD_TORCH_CHECK(
      gather || x.size(0) == count, op, ": x must be [", count, ", K], gathered as rows are, got ", described(x));
  check_matrix(op, "weight", weight, x);
  STD_TORCH_CHECK(
      weight.size(transposed ? 0 : 1) == x.size(1), op, ": weight must be ", transposed ? "[" : "[N, ", x.size(1),
      transposed ? ", N]" : "]", ", got ", described(weight));
  check_dtype(op, "weight", weight, x);
  check_bias(op, bias, weight.size(transposed ? 1 : 0), x);
  return count;
}

// What such a product is added to: [M, N], with as many rows as x where these are gathered.
inline void check_product_target(
    const char* op, const char* name, const Tensor& target, const Tensor& x, int64_t columns, bool gather) {
  check_matrix(op, name, target, x);
  STD_TORCH_CHECK(
      target.size(1) == columns && (!gather || target.size(0) == x.size(0)), op, ": ", name, " must be [",
      gather ? std::to_string(x.size(0)) : "M", ", ", columns, "], got ", described(target));
  check_dtype(op, name, target, x);
}

inline int64_t check_gather_linear_scatter(
    const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& rows,
    const std::optional<Tensor>& residual, bool gather, bool transposed, bool takes_float64) {
  const int64_t count = check_gathered_product(op, x, weight, bias, rows, gather, transposed, takes_float64);
  if (residual.has_value()) {
    check_product_target(op, "residual", *residual, x, weight.size(transposed ? 1 : 0), gather);
  }
  return count;
}

// Whether memory between the first and the last element of one tensor is between those of the other, too.
inline bool interleaved(const Tensor& first, const Tensor& second) {
  if (first.numel() == 0 || second.numel() == 0) return false;
  const auto begin = [](const Tensor& tensor) { return static_cast<const char*>(tensor.const_data_ptr()); };
  const auto end = [&](const Tensor& tensor) {
    int64_t steps = 1;
    for (int64_t d = 0; d < tensor.dim(); ++d) steps += (tensor.size(d) - 1) * tensor.stride(d);
    return begin(tensor) + steps * tensor.element_size();
  };
  return begin(first) < end(second) && begin(second) < end(first);
}

inline void check_lies_apart(
    const char* op, const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  STD_TORCH_CHECK(
      !interleaved(tensor, other), op, ": ", name, " is written in place and must lie apart from ", other_name,
      " in memory, got one within the other");
}

// The same in place of out, which the product must not read.
inline int64_t check_gather_linear_scatter_(
    const char* op, const Tensor& out, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& rows, bool gather, bool transposed, bool takes_float64) {
  const int64_t count = check_gathered_product(op, x, weight, bias, rows, gather, transposed, takes_float64);
  check_product_target(op, "out", out, x, weight.size(transposed ? 1 : 0), gather);
  check_apart(op, "out", out);
  check_lies_apart(op, "out", out, "x", x);
  check_lies_apart(op, "out", out, "weight", weight);
  if (bias.has_value()) check_lies_apart(op, "out", out, "bias", *bias);
  return count;
}

}  // namespace peft_kernels
