// LoRA operators on CUDA devices: argument checks first, then the kernels of lora_kernels.h; and their registration.
//
// Written against libtorch's stable ABI, so that the library builds without a CUDA build of torch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../common/library_gemm.h"
#include "../common/lora_checks.h"
#include "../common/philox.h"
#include "lora_kernels.h"

namespace peft_kernels {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr bool kTakesFloat64 = false;

// `rows` by `columns` is the matrix that is dropped from.
Dropout make_dropout(
    const char* op, double dropout_p, const std::optional<Tensor>& rng_state, int64_t rows, int64_t columns,
    const Tensor& like) {
  if (!check_dropout(op, dropout_p, rng_state, rows, columns, like)) return {};
  return {torch::stable::contiguous(*rng_state), dropout_threshold(dropout_p), dropout_scale(dropout_p)};
}

Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// What the caller does not need.
Tensor nothing_like(const Tensor& tensor) { return new_tensor(tensor, {0}, tensor.scalar_type()); }

// x matrix + bias + D * (scaling hidden factor). In float32 the library's product, which is exact where tensor cores
// are not, and a pass over its result.
Tensor matmul(
    const char* op, const Tensor& x, const Tensor& matrix, const std::optional<Tensor>& bias, const Tensor& hidden,
    const Tensor& factor, double scaling, const Dropout& dropout) {
  if (x.scalar_type() == ScalarType::Float) {
    Tensor out = library_matmul(x, matrix, bias, false);
    start_accumulate(op, out, hidden, factor, scaling, dropout);
    return out;
  }
  Tensor out = new_tensor(x, {x.size(0), matrix.size(1)}, x.scalar_type());
  start_matmul(op, out, x, matrix, bias, hidden, factor, scaling, dropout);
  return out;
}

Tensor shrink(const char* op, const Tensor& x, const Tensor& factor, double scaling, const Dropout& dropout) {
  Tensor hidden = new_tensor(x, {x.size(0), factor.size(0)}, ScalarType::Float);
  start_shrink(op, hidden, x, factor, scaling, dropout);
  return hidden;
}

Tensor factor_grad(
    const char* op, const Tensor& x, const Tensor& hidden, double scaling, const Dropout& dropout, ScalarType dtype,
    bool transposed) {
  const int64_t columns = x.size(1), rank = hidden.size(1);
  Tensor grad = transposed ? new_tensor(x, {columns, rank}, dtype) : new_tensor(x, {rank, columns}, dtype);
  start_factor_grad(op, grad, x, hidden, scaling, dropout, transposed);
  return grad;
}

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

Tensor dropout_mask(int64_t rows, int64_t columns, double dropout_p, const Tensor& rng_state) {
  constexpr const char* op = "dropout_mask";
  check_mask_size(op, rows, columns);
  check_dropout(op, dropout_p, rng_state, rows, columns, rng_state);
  check_rng_state(op, rng_state, rng_state);
  const DeviceGuard guard(rng_state.get_device_index());
  Tensor keep = new_tensor(rng_state, {rows, columns}, ScalarType::Bool);
  start_dropout_mask(op, keep, dropout_p, torch::stable::contiguous(rng_state));
  return keep;
}

Tensor lora_shrink(
    const Tensor& x, const Tensor& factor, double scaling, double dropout_p, std::optional<Tensor> rng_state) {
  constexpr const char* op = "lora_shrink";
  check_activations(op, "x", x, kTakesFloat64);
  check_factor(op, "factor", factor, x.size(1), x);
  const DeviceGuard guard(x.get_device_index());
  return shrink(op, x, factor, scaling, make_dropout(op, dropout_p, rng_state, x.size(0), x.size(1), x));
}

void lora_accumulate_(
    Tensor out, const Tensor& hidden, const Tensor& factor, double scaling, double dropout_p,
    std::optional<Tensor> rng_state) {
  constexpr const char* op = "lora_accumulate_";
  check_activations(op, "out", out, kTakesFloat64);
  check_apart(op, "out", out);
  check_factor(op, "factor", factor, out.size(1), out);
  check_rank(op, "factor", factor, check_hidden(op, hidden, out.size(0), out));
  const DeviceGuard guard(out.get_device_index());
  const Dropout dropout = make_dropout(op, dropout_p, rng_state, out.size(0), out.size(1), out);
  start_accumulate(op, out, hidden, factor, scaling, dropout);
}

Tensor lora_matmul(
    const Tensor& x, const Tensor& matrix, std::optional<Tensor> bias, const Tensor& hidden, const Tensor& factor,
    double scaling, double dropout_p, std::optional<Tensor> rng_state) {
  constexpr const char* op = "lora_matmul";
  check_activations(op, "x", x, kTakesFloat64);
  check_inner(op, matrix, x);
  check_bias(op, bias, matrix.size(1), x);
  check_factor(op, "factor", factor, matrix.size(1), x);
  check_rank(op, "factor", factor, check_hidden(op, hidden, x.size(0), x));
  const DeviceGuard guard(x.get_device_index());
  const Dropout dropout = make_dropout(op, dropout_p, rng_state, x.size(0), matrix.size(1), x);
  return matmul(op, x, matrix, bias, hidden, factor, scaling, dropout);
}

Tensor lora_factor_grad(
    const Tensor& x, const Tensor& hidden, double scaling, double dropout_p, std::optional<Tensor> rng_state,
    ScalarType dtype, bool as_transpose) {
  constexpr const char* op = "lora_factor_grad";
  check_activations(op, "x", x, kTakesFloat64);
  check_hidden(op, hidden, x.size(0), x);
  check_grad_dtype(op, dtype, kTakesFloat64);
  const DeviceGuard guard(x.get_device_index());
  const Dropout dropout = make_dropout(op, dropout_p, rng_state, x.size(0), x.size(1), x);
  return factor_grad(op, x, hidden, scaling, dropout, dtype, as_transpose);
}

std::tuple<Tensor, Tensor> lora_grad_b(
    const Tensor& grad_out, const Tensor& hidden, const Tensor& lora_b, double scaling) {
  constexpr const char* op = "lora_grad_b";
  check_activations(op, "grad_out", grad_out, kTakesFloat64);
  check_shape(op, "lora_b", lora_b, grad_out.size(1), check_hidden(op, hidden, grad_out.size(0), grad_out), grad_out);
  check_factor_dtype(op, "lora_b", lora_b, grad_out);
  const DeviceGuard guard(grad_out.get_device_index());
  return {
      shrink(op, grad_out, transposed(lora_b), scaling, Dropout()),
      factor_grad(op, grad_out, hidden, scaling, Dropout(), lora_b.scalar_type(), true)};
}

std::tuple<Tensor, Tensor> lora_linear_forward(
    const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& lora_a, const Tensor& lora_b,
    double scaling, double dropout_p, std::optional<Tensor> rng_state) {
  constexpr const char* op = "lora_linear_forward";
  check_activations(op, "x", x, kTakesFloat64);
  check_forward(op, x, weight, bias, lora_a, lora_b);
  const DeviceGuard guard(x.get_device_index());
  const Dropout dropout = make_dropout(op, dropout_p, rng_state, x.size(0), x.size(1), x);
  Tensor hidden = shrink(op, x, lora_a, 1.0, dropout);
  Tensor y = matmul(op, x, transposed(weight), bias, hidden, transposed(lora_b), scaling, Dropout());
  return {y, hidden};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& grad_out, std::optional<Tensor> x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
    const Tensor& hidden, double scaling, double dropout_p, std::optional<Tensor> rng_state, bool need_x, bool need_a,
    bool need_b) {
  constexpr const char* op = "lora_linear_backward";
  check_activations(op, "grad_out", grad_out, kTakesFloat64);
  check_backward(op, grad_out, x, weight, lora_a, lora_b, hidden, need_a);
  const DeviceGuard guard(grad_out.get_device_index());
  const Dropout dropout = make_dropout(op, dropout_p, rng_state, grad_out.size(0), weight.size(1), grad_out);
  Tensor dx = nothing_like(grad_out), grad_a = nothing_like(lora_a), grad_b = nothing_like(lora_b);
  if (need_b) grad_b = factor_grad(op, grad_out, hidden, scaling, Dropout(), lora_b.scalar_type(), true);
  if (!need_x && !need_a) return {dx, grad_a, grad_b};
  const Tensor grad_hidden = shrink(op, grad_out, transposed(lora_b), scaling, Dropout());
  if (need_x) dx = matmul(op, grad_out, weight, std::nullopt, grad_hidden, lora_a, 1.0, dropout);
  if (need_a) grad_a = factor_grad(op, *x, grad_hidden, 1.0, dropout, lora_a.scalar_type(), false);
  return {dx, grad_a, grad_b};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("dropout_mask", TORCH_BOX(&peft_kernels::dropout_mask));
  m.impl("lora_shrink", TORCH_BOX(&peft_kernels::lora_shrink));
  m.impl("lora_accumulate_", TORCH_BOX(&peft_kernels::lora_accumulate_));
  m.impl("lora_matmul", TORCH_BOX(&peft_kernels::lora_matmul));
  m.impl("lora_factor_grad", TORCH_BOX(&peft_kernels::lora_factor_grad));
  m.impl("lora_grad_b", TORCH_BOX(&peft_kernels::lora_grad_b));
  m.impl("lora_linear_forward", TORCH_BOX(&peft_kernels::lora_linear_forward));
  m.impl("lora_linear_backward", TORCH_BOX(&peft_kernels::lora_linear_backward));
}
