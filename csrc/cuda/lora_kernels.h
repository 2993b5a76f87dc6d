// The kernels of the LoRA family as their operators start them; formulas in peft_kernels/reference/lora.py. Arguments
// have been checked; every tensor is on one device, which is current. Activations are float32, bfloat16 or float16,
// factors any of these, hidden float32.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "loaders.h"

namespace peft_kernels {

using torch::stable::Tensor;

// D of the formulas: the Philox stream, the draws that drop, and the 1 / (1 - p) on what is kept.
struct Dropout {
  std::optional<Tensor> rng_state;  // none without dropout
  uint32_t threshold = 0;
  double scale = 1.0;
};

// keep [rows, columns], bool, contiguous.
void start_dropout_mask(const char* operation, const Tensor& keep, double dropout_p, const Tensor& rng_state);

// out [M, C] += D * (scaling hidden [M, r] factor [r, C]).
void start_accumulate(
    const char* operation, const Tensor& out, const Tensor& hidden, const Tensor& factor, double scaling,
    const Dropout& dropout);

// out [M, r] float32, contiguous = scaling (D * x [M, C]) factor [r, C]^T.
void start_shrink(
    const char* operation, const Tensor& out, const Tensor& x, const Tensor& factor, double scaling,
    const Dropout& dropout);

// out, contiguous, [r, C] or transposed [C, r] = scaling hidden [M, r]^T (D * x [M, C]).
void start_factor_grad(
    const char* operation, const Tensor& out, const Tensor& x, const Tensor& hidden, double scaling,
    const Dropout& dropout, bool transposed);

// out [M, C_out], contiguous = x [M, C_in] matrix [C_in, C_out] + bias + D * (scaling hidden factor [r, C_out]); 16-bit
// types only.
void start_matmul(
    const char* operation, const Tensor& out, const Tensor& x, const Tensor& matrix, const std::optional<Tensor>& bias,
    const Tensor& hidden, const Tensor& factor, double scaling, const Dropout& dropout);

}  // namespace peft_kernels
