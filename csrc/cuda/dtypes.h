// Element types of activations, factors and results, where a kernel learns them at run time.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace peft_kernels {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

enum class DType : int32_t { float32, bfloat16, float16 };

inline DType dtype_of(ScalarType dtype) {
  return dtype == ScalarType::Float ? DType::float32 : dtype == ScalarType::BFloat16 ? DType::bfloat16 : DType::float16;
}

__device__ __forceinline__ float load_float(const void* data, int64_t index, DType dtype) {
  switch (dtype) {
    case DType::bfloat16:
      return static_cast<float>(static_cast<const BFloat16*>(data)[index]);
    case DType::float16:
      return static_cast<float>(static_cast<const Half*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

__device__ __forceinline__ void store_float(void* data, int64_t index, DType dtype, float value) {
  if (dtype == DType::float32) {
    static_cast<float*>(data)[index] = value;
  } else if (dtype == DType::bfloat16) {
    static_cast<BFloat16*>(data)[index] = static_cast<BFloat16>(value);
  } else {
    static_cast<Half*>(data)[index] = static_cast<Half>(value);
  }
}

}  // namespace peft_kernels
