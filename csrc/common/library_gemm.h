// The product behind torch.mm, for operators that go on from its result.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <optional>

namespace peft_kernels {

using torch::stable::Tensor;

// Keeps autograd from recording: what calls these operators has a formula for the gradient of the whole.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) {
    if (before_) aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGrad() {
    if (before_) aoti_torch_grad_mode_set_enabled(true);
  }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

// x matrix (+ bias) by the library GEMM, into a fresh tensor; x matrix^T when transposed.
inline Tensor library_matmul(
    const Tensor& x, const Tensor& matrix, const std::optional<Tensor>& bias, bool transposed) {
  const NoGrad no_grad;
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack = {from(x)};
  if (transposed || bias.has_value()) {
    stack[1] = from(transposed ? matrix : torch::stable::transpose(matrix, 0, 1));
    stack[2] = from(bias);
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  } else {
    stack[1] = from(matrix);
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
  }
  Tensor out = torch::stable::detail::to<Tensor>(stack[0]);
  // Autocast would change the dtype under us; lora_linear casts before it calls.
  STD_TORCH_CHECK(
      out.scalar_type() == x.scalar_type(), "peft_kernels: the library GEMM changed the dtype; is autocast on?");
  return out;
}

}  // namespace peft_kernels
