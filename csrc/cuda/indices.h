// Positions in sorted lists of them, int32 or int64 as the caller has them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../common/describe.h"

namespace peft_kernels {

struct IndicesView {
  const void* data;
  bool wide;  // int64, not int32

  __device__ __forceinline__ int64_t operator[](int64_t entry) const {
    return wide ? static_cast<const int64_t*>(data)[entry] : int64_t{static_cast<const int32_t*>(data)[entry]};
  }
};

inline IndicesView indices_view(const Tensor& indices) {
  return {indices.const_data_ptr(), indices.scalar_type() == ScalarType::Long};
}

// The first entry in [begin, end) that is not below `position`; `end` without one.
__device__ __forceinline__ int64_t
lower_bound(const IndicesView& indices, int64_t begin, int64_t end, int64_t position) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (indices[middle] < position) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

}  // namespace peft_kernels
