// The products that the LoRA operators on the CPU are made of, on checked arguments.
//
// Activations `x` and `out` have unit column stride (see with_unit_columns), `hidden` is contiguous. A factor is
// [r, C]; where `transposed` says so, the tensor holds it as [C, r], the layout of lora_b.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "../common/describe.h"
#include "lora_kernels.h"
#include "parallel.h"

namespace peft_kernels {

// The kernels of the best instruction set this processor has, or of the one the environment asks for.
const LoraKernels& kernels();

// The kernels' name of a floating dtype.
inline DType dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      return DType::f32;
  }
}

// The dtype that sums over activations of `dtype` are kept in, and its size.
inline ScalarType accumulation_type(DType dtype) {
  return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
}
inline int64_t accumulation_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// The matrix with unit column stride: the tensor itself wherever possible.
Tensor with_unit_columns(const Tensor& tensor);
// Asking first spares a dispatcher call, which a small layer would notice.
Tensor as_contiguous(const Tensor& tensor);
// torch::stable::new_empty without the boxing of its arguments, which takes twice as long as the allocation.
Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);
// [M, r] of a contiguous tensor.
inline Hidden hidden_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.size(1)}; }

// The mask of a [rows, columns] matrix drawn once, for products that share it or want it whole.
class Drawn {
 public:
  Drawn(const Dropout& dropout, int64_t rows, int64_t columns);
  // The same dropout, which reads the mask instead of drawing it; valid as long as this is.
  const Dropout& dropout() const { return dropout_; }

 private:
  Scratch words_;
  Dropout dropout_;
};

// hidden = scaling (D * x) factor^T.
void shrink_into(
    const Hidden& hidden, const Tensor& x, const Tensor& lora_factor, double scaling, DType dtype,
    const Dropout& dropout, bool transposed = false);

// out += D * (scaling hidden factor).
void accumulate_into(
    const Tensor& out, const Hidden& hidden, const Tensor& lora_factor, double scaling, DType dtype,
    const Dropout& dropout, bool transposed = false);

// grad = scaling hidden^T (D * x) in grad's dtype: [r, C], or [C, r] when transposed; contiguous.
void factor_grad_into(
    const Tensor& grad, const Tensor& x, const Hidden& hidden, double scaling, DType dtype, const Dropout& dropout,
    bool transposed);

// x matrix + bias + D * (scaling hidden factor), a fresh tensor: matrix [C_in, C_out] and factor [r, C_out], or both
// transposed, as weight and lora_b are in the forward pass.
Tensor matmul(
    const Tensor& x, const Tensor& matrix, const std::optional<Tensor>& bias, const Hidden& hidden,
    const Tensor& lora_factor, double scaling, DType dtype, const Dropout& dropout, bool transposed = false);

}  // namespace peft_kernels
