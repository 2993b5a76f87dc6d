// The dtypes of weights, activations and values; tables of kernels are indexed by them.
#pragma once

namespace peft_kernels {

enum class DType { f32, bf16, f16, f64 };
constexpr int kDTypes = 4;

}  // namespace peft_kernels
