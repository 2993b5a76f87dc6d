// LoRA operators on the CPU: argument checks first, then the products of lora_products.h; and their registration.
#include "lora_checks.h"
#include "lora_products.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace peft_kernels {
namespace {

Tensor dropout_mask(int64_t rows, int64_t columns, double dropout_p, Tensor rng_state) {
  constexpr const char* op = "dropout_mask";
  check_mask_size(op, rows, columns);
  check_rng_state(op, rng_state, rng_state);
  const Dropout dropout = make_dropout(op, dropout_p, rng_state, rows, columns, rng_state);
  Tensor mask = new_tensor(rng_state, {rows, columns}, ScalarType::Bool);
  bool* keep = static_cast<bool*>(mask.data_ptr());
  const LoraKernels& table = kernels();  // chosen before the parallel region, to raise its errors here
  parallel_units(rows, 1, columns * 8, [&](int64_t begin, int64_t end) {
    table.dropout_mask(keep, columns, begin, end, dropout);
  });
  return mask;
}

Tensor lora_shrink(Tensor x, Tensor factor, double scaling, double dropout_p, std::optional<Tensor> rng_state) {
  constexpr const char* op = "lora_shrink";
  const DType dtype = activation_dtype(op, "x", x);
  check_factor(op, "factor", factor, x.size(1), x);
  const Dropout dropout = make_dropout(op, dropout_p, rng_state, x.size(0), x.size(1), x);
  Tensor hidden = new_tensor(x, {x.size(0), factor.size(0)}, accumulation_type(dtype));
  shrink_into(hidden_of(hidden), with_unit_columns(x), factor, scaling, dtype, dropout);
  return hidden;
}

void lora_accumulate_(
    Tensor out, Tensor hidden, Tensor factor, double scaling, double dropout_p, std::optional<Tensor> rng_state) {
  constexpr const char* op = "lora_accumulate_";
  const DType dtype = activation_dtype(op, "out", out);
  check_apart(op, "out", out);
  check_factor(op, "factor", factor, out.size(1), out);
  check_rank(op, "factor", factor, check_hidden(op, hidden, out.size(0), out));
  const Dropout dropout = make_dropout(op, dropout_p, rng_state, out.size(0), out.size(1), out);
  Tensor rows = with_unit_columns(out);
  const Tensor left = as_contiguous(hidden);
  accumulate_into(rows, hidden_of(left), factor, scaling, dtype, dropout);
  if (rows.data_ptr() != out.data_ptr()) torch::stable::copy_(out, rows);
}

Tensor lora_matmul(
    Tensor x, Tensor matrix, std::optional<Tensor> bias, Tensor hidden, Tensor factor, double scaling, double dropout_p,
    std::optional<Tensor> rng_state) {
  constexpr const char* op = "lora_matmul";
  const DType dtype = activation_dtype(op, "x", x);
  check_inner(op, matrix, x);
  check_bias(op, bias, matrix.size(1), x);
  check_factor(op, "factor", factor, matrix.size(1), x);
  check_rank(op, "factor", factor, check_hidden(op, hidden, x.size(0), x));
  const Dropout dropout = make_dropout(op, dropout_p, rng_state, x.size(0), matrix.size(1), x);
  const Tensor left = as_contiguous(hidden);
  return matmul(x, matrix, bias, hidden_of(left), factor, scaling, dtype, dropout);
}

Tensor lora_factor_grad(
    Tensor x, Tensor hidden, double scaling, double dropout_p, std::optional<Tensor> rng_state, ScalarType dtype,
    bool transposed) {
  constexpr const char* op = "lora_factor_grad";
  const DType activations = activation_dtype(op, "x", x);
  const int64_t rank = check_hidden(op, hidden, x.size(0), x);
  check_grad_dtype(op, dtype, true);
  const Dropout dropout = make_dropout(op, dropout_p, rng_state, x.size(0), x.size(1), x);
  const int64_t columns = x.size(1);
  Tensor grad = transposed ? new_tensor(x, {columns, rank}, dtype) : new_tensor(x, {rank, columns}, dtype);
  const Tensor left = as_contiguous(hidden);
  factor_grad_into(grad, with_unit_columns(x), hidden_of(left), scaling, activations, dropout, transposed);
  return grad;
}

std::tuple<Tensor, Tensor> lora_grad_b(Tensor grad_out, Tensor hidden, Tensor lora_b, double scaling) {
  constexpr const char* op = "lora_grad_b";
  const DType dtype = activation_dtype(op, "grad_out", grad_out);
  const int64_t rank = check_hidden(op, hidden, grad_out.size(0), grad_out);
  check_shape(op, "lora_b", lora_b, grad_out.size(1), rank, grad_out);
  check_factor_dtype(op, "lora_b", lora_b, grad_out);
  Tensor grad_hidden = new_tensor(grad_out, {grad_out.size(0), rank}, accumulation_type(dtype));
  Tensor grad_b = new_tensor(grad_out, {grad_out.size(1), rank}, lora_b.scalar_type());
  const Tensor dy = with_unit_columns(grad_out), left = as_contiguous(hidden);
  // Both products read dy; on the CPU the second read comes from the cache, so each keeps its own best split.
  shrink_into(hidden_of(grad_hidden), dy, lora_b, scaling, dtype, Dropout(), true);
  factor_grad_into(grad_b, dy, hidden_of(left), scaling, dtype, Dropout(), true);
  return {grad_hidden, grad_b};
}

std::tuple<Tensor, Tensor> lora_linear_forward(
    Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, double scaling, double dropout_p,
    std::optional<Tensor> rng_state) {
  constexpr const char* op = "lora_linear_forward";
  const DType dtype = activation_dtype(op, "x", x);
  check_forward(op, x, weight, bias, lora_a, lora_b);
  const Dropout dropout = make_dropout(op, dropout_p, rng_state, x.size(0), x.size(1), x);
  Tensor hidden = new_tensor(x, {x.size(0), lora_a.size(0)}, accumulation_type(dtype));
  const Tensor rows = with_unit_columns(x);
  shrink_into(hidden_of(hidden), rows, lora_a, 1.0, dtype, dropout);
  return {matmul(rows, weight, bias, hidden_of(hidden), lora_b, scaling, dtype, Dropout(), true), hidden};
}

// What the caller does not need.
Tensor nothing_like(const Tensor& tensor) { return new_tensor(tensor, {0}, tensor.scalar_type()); }

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(
    Tensor grad_out, std::optional<Tensor> x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor hidden,
    double scaling, double dropout_p, std::optional<Tensor> rng_state, bool need_x, bool need_a, bool need_b) {
  constexpr const char* op = "lora_linear_backward";
  const DType dtype = activation_dtype(op, "grad_out", grad_out);
  check_backward(op, grad_out, x, weight, lora_a, lora_b, hidden, need_a);
  const int64_t rows = grad_out.size(0), out_features = grad_out.size(1);
  const int64_t rank = lora_a.size(0), in_features = lora_a.size(1);
  const Dropout dropout = make_dropout(op, dropout_p, rng_state, rows, in_features, grad_out);

  const Tensor dy = with_unit_columns(grad_out);
  Tensor grad_a = need_a ? new_tensor(lora_a, {rank, in_features}, lora_a.scalar_type()) : nothing_like(lora_a);
  Tensor grad_b = need_b ? new_tensor(lora_b, {out_features, rank}, lora_b.scalar_type()) : nothing_like(lora_b);
  if (need_b) {
    const Tensor left = as_contiguous(hidden);
    factor_grad_into(grad_b, dy, hidden_of(left), scaling, dtype, Dropout(), true);
  }
  if (!need_x && !need_a) return {nothing_like(grad_out), grad_a, grad_b};
  const Scratch memory(rows * rank * accumulation_bytes(dtype));
  const Hidden grad_hidden = {memory.get(), rank};
  shrink_into(grad_hidden, dy, lora_b, scaling, dtype, Dropout(), true);
  const Drawn drawn(dropout, rows, in_features);  // dx and grad_a share the mask
  if (need_a) factor_grad_into(grad_a, with_unit_columns(*x), grad_hidden, 1.0, dtype, drawn.dropout(), false);
  if (!need_x) return {nothing_like(grad_out), grad_a, grad_b};
  return {matmul(dy, weight, std::nullopt, grad_hidden, lora_a, 1.0, dtype, drawn.dropout()), grad_a, grad_b};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("dropout_mask", TORCH_BOX(&peft_kernels::dropout_mask));
  m.impl("lora_shrink", TORCH_BOX(&peft_kernels::lora_shrink));
  m.impl("lora_accumulate_", TORCH_BOX(&peft_kernels::lora_accumulate_));
  m.impl("lora_matmul", TORCH_BOX(&peft_kernels::lora_matmul));
  m.impl("lora_factor_grad", TORCH_BOX(&peft_kernels::lora_factor_grad));
  m.impl("lora_grad_b", TORCH_BOX(&peft_kernels::lora_grad_b));
  m.impl("lora_linear_forward", TORCH_BOX(&peft_kernels::lora_linear_forward));
  m.impl("lora_linear_backward", TORCH_BOX(&peft_kernels::lora_linear_backward));
}
