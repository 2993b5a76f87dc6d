// The two ways to (grad_out^T x)[indices]: grad_out [M, N], x [M, K] of one dtype, indices sorted flat positions
// n K + k, out [entries] contiguous in any dtype. Arguments have been checked, and there is an entry; every tensor is
// on one device, which is current.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace peft_kernels {

using torch::stable::Tensor;

// The product tile by tile on the tensor cores; of each tile only the entries leave the registers.
void start_sampled_tiles(
    const char* operation, const Tensor& out, const Tensor& grad_out, const Tensor& x, const Tensor& indices);

// A dot product per entry. M must not be 0.
void start_sampled_dots(
    const char* operation, const Tensor& out, const Tensor& grad_out, const Tensor& x, const Tensor& indices);

}  // namespace peft_kernels
