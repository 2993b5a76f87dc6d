// Sums up to each element of a list of counts, by the library's own kernels: on integers they are exact in any order.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <optional>

namespace peft_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The sum of counts [0] to [i] at each i; int64, 1-D.
inline Tensor running_sums(const Tensor& counts) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack = {from(counts), from(int64_t{0}), from(std::optional<ScalarType>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace peft_kernels
