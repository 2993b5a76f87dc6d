// From rows of a matrix to their places in a list of some of them: what one pass over the whole matrix asks.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace peft_kernels {

using torch::stable::Tensor;

// map [total], int32 read as uint32: for each row of a matrix one more than its place in rows [S], 0 if it has none.
// 4 bytes per row of the matrix are written twice at most, and 4 S read.
Tensor row_map(const char* operation, const Tensor& rows, int64_t total);

// What a kernel reads of it.
inline const uint32_t* places_of(const Tensor& map) { return static_cast<const uint32_t*>(map.const_data_ptr()); }

}  // namespace peft_kernels
