// What the products that are wanted at some entries only ask of their arguments, on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "lora_checks.h"

namespace peft_kernels {

// grad_out [M, N] has been checked; x [M, K] and the positions in the product [N, K] follow it.
inline void check_sampled(const char* op, const Tensor& grad_out, const Tensor& x, const Tensor& indices) {
  check_matrix(op, "x", x, grad_out);
  check_dtype(op, "x", x, grad_out);
  const int64_t rows = grad_out.size(0), entries = grad_out.size(1) * x.size(1);
  STD_TORCH_CHECK(x.size(0) == rows, op, ": x must be [", rows, ", K], got ", described(x));
  STD_TORCH_CHECK(indices.dim() == 1, op, ": indices must be 1-D, got ", described(indices));
  STD_TORCH_CHECK(
      indices.scalar_type() == ScalarType::Int || indices.scalar_type() == ScalarType::Long, op,
      ": indices must be int32 or int64, got ", described(indices));
  check_device(op, "indices", indices, grad_out);
  STD_TORCH_CHECK(
      indices.is_contiguous(), op, ": indices must be contiguous, got ", described(indices), " with stride ",
      indices.stride(0));
  STD_TORCH_CHECK(
      indices.size(0) <= entries, op, ": indices must be at most N K = ", entries, " positions, got ",
      described(indices));
}

}  // namespace peft_kernels
