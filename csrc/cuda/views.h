// What kernels are told about tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "loaders.h"
#include "lora_kernels.h"

namespace peft_kernels {

// Whether runs of neighbors, `run_stride` elements apart, can be read and written 16 bytes at a time.
inline bool allows_vectors(const void* data, int64_t run_stride, int64_t neighbor_stride, int64_t element_bytes) {
  return neighbor_stride == 1 && reinterpret_cast<uintptr_t>(data) % kChunkBytes == 0 &&
         run_stride * element_bytes % kChunkBytes == 0;
}

// Dimension `outer` of a matrix as the outer index of an operand, the other as its depth. `along` is that of its tile.
inline OperandView operand_view(const Tensor& matrix, int outer, Along along) {
  const int depth = 1 - outer;
  const void* data = matrix.const_data_ptr();
  const int64_t outer_stride = matrix.stride(outer), depth_stride = matrix.stride(depth);
  const bool vectors = along == Along::depth ? allows_vectors(data, outer_stride, depth_stride, matrix.element_size())
                                             : allows_vectors(data, depth_stride, outer_stride, matrix.element_size());
  return {data,   matrix.size(outer), matrix.size(depth), outer_stride, depth_stride, dtype_of(matrix.scalar_type()),
          vectors};
}

inline DropoutView dropout_view(const Dropout& dropout) {
  if (!dropout.rng_state.has_value()) return {nullptr, 0};
  return {static_cast<const int64_t*>(dropout.rng_state->const_data_ptr()), dropout.threshold};
}

// The operand that stands for the mask's generator in a launch; without dropout, `other` once more.
inline const Tensor& rng_operand(const Dropout& dropout, const Tensor& other) {
  return dropout.rng_state.has_value() ? *dropout.rng_state : other;
}

// Calls `function` with a value of the C++ type of an activation dtype.
template <typename Function>
void with_element_type(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float32:
      return function(float());
    case DType::bfloat16:
      return function(BFloat16());
    case DType::float16:
      return function(Half());
  }
}

}  // namespace peft_kernels
