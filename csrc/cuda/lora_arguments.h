// What the kernel of lora_accumulate_ is told, and how that follows from its tensors; plain C++, shared with the CPU.
#pragma once

#include <cstdint>

#include "../common/philox.h"

namespace peft_kernels {

// A strided matrix in memory; strides count elements.
struct MatrixView {
  void* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
  int64_t element_bytes;
};

// Passed by value. `rng_state` is null without dropout; `scale` includes the 1 / (1 - p) of D.
struct AccumulateArguments {
  void* out;
  const float* hidden;
  const void* factor;
  const int64_t* rng_state;
  int64_t rows, columns, rank;
  int64_t out_row_stride, out_column_stride;
  int64_t hidden_row_stride, hidden_rank_stride;
  int64_t factor_rank_stride, factor_column_stride;
  float scale;
  uint32_t threshold;
  bool out_vectors, factor_vectors;  // whether 16-byte accesses along the columns are possible
};

// Whether every row starts on a 16-byte boundary and has its columns side by side.
inline bool allows_vectors(const MatrixView& matrix) {
  constexpr int64_t kVectorBytes = 16;
  return matrix.column_stride == 1 && reinterpret_cast<uintptr_t>(matrix.data) % kVectorBytes == 0 &&
         matrix.row_stride * matrix.element_bytes % kVectorBytes == 0;
}

// Whether no two elements share memory, so that threads may write them independently. True for slices of a matrix and
// of its transpose; as_strided can lay out matrices without overlap that this refuses.
inline bool elements_are_apart(const MatrixView& matrix) {
  const int64_t row_stride = matrix.rows > 1 ? matrix.row_stride : 1;
  const int64_t column_stride = matrix.columns > 1 ? matrix.column_stride : 1;
  return (column_stride > 0 && row_stride > (matrix.columns - 1) * column_stride) ||
         (row_stride > 0 && column_stride > (matrix.rows - 1) * row_stride);
}

// out [M, C], hidden [M, r] float, factor [r, C]; `rng_state` (seed, offset) may be null, which means no dropout.
inline AccumulateArguments accumulate_arguments(
    const MatrixView& out, const MatrixView& hidden, const MatrixView& factor, double scaling, double dropout_p,
    const int64_t* rng_state) {
  const bool dropout = rng_state != nullptr && dropout_p > 0.0;
  AccumulateArguments a = {};
  a.out = out.data;
  a.hidden = static_cast<const float*>(hidden.data);
  a.factor = factor.data;
  a.rng_state = dropout ? rng_state : nullptr;
  a.rows = out.rows;
  a.columns = out.columns;
  a.rank = hidden.columns;
  a.out_row_stride = out.row_stride;
  a.out_column_stride = out.column_stride;
  a.hidden_row_stride = hidden.row_stride;
  a.hidden_rank_stride = hidden.column_stride;
  a.factor_rank_stride = factor.row_stride;
  a.factor_column_stride = factor.column_stride;
  a.scale = static_cast<float>(dropout ? scaling * dropout_scale(dropout_p) : scaling);
  a.threshold = dropout ? dropout_threshold(dropout_p) : 0;
  a.out_vectors = allows_vectors(out);
  a.factor_vectors = allows_vectors(factor);
  return a;
}

}  // namespace peft_kernels
