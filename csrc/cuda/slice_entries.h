// The entries of a slice of channels, counted in the order of the slice, and where each lies in the weight [N, K]. At
// dim 0 the slice is [s, K] and its rows are runs of the weight; at dim 1 it is [N, s], and the channels of a head or
// of permuted weights are runs too. Four entries that are neighbors in the weight are written at once.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "sparse_entries.h"

namespace peft_kernels {

// A quotient of numbers that are not negative; in 32 bits, where both fit, at a fraction of the instructions.
__device__ __forceinline__ int64_t quotient(int64_t value, int64_t divisor, bool narrow) {
  return narrow ? static_cast<uint32_t>(value) / static_cast<uint32_t>(divisor) : value / divisor;
}

inline bool fits_32_bits(int64_t value) { return value < int64_t{1} << 32; }

struct SliceTarget {
  void* weight;  // null: nowhere
  DType dtype;
  const int64_t* indices;
  int64_t columns;         // of the slice
  int64_t weight_columns;  // K
  bool rows;               // whether indices are rows of the weight
  bool narrow;             // whether entries can be counted with 32 bits
};

inline SliceTarget slice_target(const Tensor& weight, const Tensor& indices, const Tensor& slice, int64_t dim) {
  return {
      weight.mutable_data_ptr(),
      dtype_of(weight.scalar_type()),
      static_cast<const int64_t*>(indices.const_data_ptr()),
      slice.size(1),
      weight.size(1),
      dim == 0,
      fits_32_bits(slice.numel())};
}

__device__ __forceinline__ void load_positions(
    const SliceTarget& target, const EntryRange& range, int64_t (&positions)[kThreadEntries]) {
  int64_t row = quotient(range.first, target.columns, target.narrow);
  int64_t column = range.first - row * target.columns;
#pragma unroll
  for (int i = 0; i < kThreadEntries; ++i) {
    positions[i] = 0;
    if (i < range.count) {
      const int64_t weight_row = target.rows ? target.indices[row] : row;
      positions[i] = weight_row * target.weight_columns + (target.rows ? column : target.indices[column]);
    }
    if (++column == target.columns) {
      column = 0;
      ++row;
    }
  }
}

// `packed` is in the weight's dtype.
__device__ __forceinline__ void store_entries(
    const SliceTarget& target, const EntryRange& range, const int64_t (&positions)[kThreadEntries],
    const PackedEntries& packed) {
  const int bytes = (target.dtype == DType::float32 ? 4 : 2) * kThreadEntries;
  const uintptr_t address = reinterpret_cast<uintptr_t>(target.weight) + positions[0] * (bytes / kThreadEntries);
  // Positions ascend, so the first and the last one tell.
  const bool run = range.count == kThreadEntries && positions[kThreadEntries - 1] - positions[0] == kThreadEntries - 1;
  if (run && address % bytes == 0) {
    store_packed({target.weight, target.dtype, true}, {positions[0], kThreadEntries}, packed);
  } else {
    store_bits(target.weight, target.dtype, range, positions, packed);
  }
}

}  // namespace peft_kernels
