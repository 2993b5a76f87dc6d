// What the operators of the delta algebra ask of their arguments, before anything runs; in the words of
// sparse_checks.h.
//
// The entries of a delta in one tensor are `values [nnz]` at `indices [nnz]`, flat positions; where every position has
// a value, `indices` may be empty. That indices are sorted, unique and in range is checked where they are read.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

#include "sparse_checks.h"

namespace peft_kernels {

constexpr int64_t kMostDeltas = 64;

inline void check_flat(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 1, op, ": ", name, " must be 1-D, got ", described(tensor));
  check_contiguous(op, name, tensor);
}

// Returns whether every position has a value.
inline bool check_delta(const char* op, const Tensor& indices, const Tensor& values) {
  check_floating(op, "values", values, true);
  check_flat(op, "values", values);
  check_flat(op, "indices", indices);
  check_device(op, "indices", indices, values);
  STD_TORCH_CHECK(
      indices.scalar_type() == ScalarType::Int || indices.scalar_type() == ScalarType::Long, op,
      ": indices must be int32 or int64, got ", described(indices));
  const bool dense = indices.numel() == 0 && values.numel() > 0;
  STD_TORCH_CHECK(
      dense || indices.numel() == values.numel(), op, ": indices must be [", values.numel(),
      "], as many as values, or empty, got ", described(indices));
  return dense;
}

inline void check_deltas(
    const char* op, const std::vector<Tensor>& indices, const std::vector<Tensor>& values, int64_t numel) {
  const int64_t count = static_cast<int64_t>(values.size());
  STD_TORCH_CHECK(
      count >= 1 && count <= kMostDeltas, op, ": values must be a list of 1 to ", kMostDeltas, " tensors, got ", count);
  STD_TORCH_CHECK(
      indices.size() == values.size(), op, ": indices must be a list as long as values, ", count, ", got ",
      indices.size());
  STD_TORCH_CHECK(numel >= 0, op, ": numel must be at least 0, got ", numel);
  for (size_t d = 0; d < values.size(); ++d) {
    const bool dense = check_delta(op, indices[d], values[d]);
    check_device(op, "values", values[d], values[0]);
    STD_TORCH_CHECK(
        dense ? values[d].numel() == numel : values[d].numel() <= numel, op, ": values must have ",
        dense ? "one number for each of " : "at most as many numbers as there are positions, ", numel, ", got ",
        described(values[d]));
  }
}

inline void check_mask(const char* op, const Tensor& mask, const Tensor& values) {
  check_entries(op, "mask", mask, values.numel(), values);
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, op, ": mask must be bool, got ", described(mask));
  check_contiguous(op, "mask", mask);
}

inline void check_ranks(const char* op, int64_t first, int64_t last) {
  STD_TORCH_CHECK(first >= 0, op, ": first must be at least 0, got ", first);
  STD_TORCH_CHECK(last >= first, op, ": last must be at least first, ", first, ", got ", last);
}

inline void check_bins(const char* op, int64_t shift, int64_t bits, int64_t key_bits) {
  STD_TORCH_CHECK(
      bits >= 1 && bits <= 16 && shift >= 0 && shift + bits <= key_bits, op,
      ": shift and bits must name at most 16 of ", key_bits, " bits, got ", shift, " and ", bits);
}

inline void check_counts(const char* op, const Tensor& counts, int64_t rows, int64_t bits, const Tensor& values) {
  check_device(op, "counts", counts, values);
  check_contiguous(op, "counts", counts);
  STD_TORCH_CHECK(
      counts.scalar_type() == ScalarType::Long && counts.numel() == (rows << bits), op, ": counts must be int64 with ",
      rows << bits, " elements, got ", described(counts));
}

}  // namespace peft_kernels
