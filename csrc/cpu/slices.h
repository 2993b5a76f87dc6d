// What the operators of slices of channels share: copies of columns, and a slice as it lies in a weight.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "delta.h"
#include "s2ft_kernels.h"

namespace peft_kernels {

inline const int64_t* channels_of(const Tensor& indices) {
  return static_cast<const int64_t*>(indices.const_data_ptr());
}

// body(an unsigned integer as large as an element).
template <typename F>
void with_bits(int64_t element_bytes, const F& body) {
  switch (element_bytes) {
    case 2:
      return body(uint16_t{});
    case 4:
      return body(uint32_t{});
    default:
      return body(uint64_t{});
  }
}

// out[j] = row[indices[j]], elements of a row `stride` apart.
template <typename Bits>
void gather_row(const Bits* row, int64_t stride, const int64_t* indices, int64_t count, Bits* out) {
  for (int64_t j = 0; j < count; ++j) out[j] = row[indices[j] * stride];
}

// out [M, s] = x[:, indices], contiguous. Bytes: the lines of x that hold a channel, and the result.
inline void gather_columns_into(const Tensor& x, const Tensor& indices, void* out) {
  const int64_t *channels = channels_of(indices), count = indices.numel();
  with_bits(x.element_size(), [&](auto bits) {
    using Bits = decltype(bits);
    const Bits* from = static_cast<const Bits*>(x.const_data_ptr());
    const int64_t row_stride = x.stride(0), column_stride = x.stride(1);
    parallel_units(x.size(0), 1, 8 * count, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        gather_row(from + m * row_stride, column_stride, channels, count, static_cast<Bits*>(out) + m * count);
      }
    });
  });
}

// Where the entries of a slice lie in a weight [N, K]: entry e of values [rows, columns] is column e % columns of row
// e / columns; they are [N, s] at dim 1, [s, K] at dim 0.
class Slice {
 public:
  Slice(const Tensor& weight, const Tensor& indices, int64_t dim)
      : weight_(weight.data_ptr()),
        weight_columns_(weight.size(1)),
        channels_(channels_of(indices)),
        columns_(dim == 0 ? weight.size(1) : indices.numel()),
        dim_(dim),
        dtype_(dtype_of(weight.scalar_type())),
        bytes_(weight.element_size()) {}

  // Entries [begin, end) of a chunk, whose values begin at `values`, rounded to the weight's dtype.
  void write(int64_t begin, int64_t end, const void* values, DType dtype) const {
    alignas(64) char rounded[kChunk * sizeof(double)];
    const void* elements = values;
    if (dtype != dtype_) {
      slice_kernels().cast[static_cast<int>(dtype)][static_cast<int>(dtype_)](values, rounded, end - begin);
      elements = rounded;
    }
    for (int64_t first = begin, last; first < end; first = last) {
      const int64_t row = first / columns_, column = first % columns_;
      last = std::min(end, (row + 1) * columns_);
      const void* from = at(elements, bytes_, first - begin);
      if (dim_ == 0) {
        std::memcpy(at(weight_, bytes_, channels_[row] * weight_columns_ + column), from, bytes_ * (last - first));
      } else {
        scatter(row, column, last - first, from);
      }
    }
  }

 private:
  // A line of the weight takes an element or two; the next row's lines are asked for while this row's are written.
  void scatter(int64_t row, int64_t column, int64_t count, const void* elements) const {
    with_bits(bytes_, [&](auto bits) {
      using Bits = decltype(bits);
      Bits* to = static_cast<Bits*>(weight_) + row * weight_columns_;
      const Bits *from = static_cast<const Bits*>(elements), *next = to + weight_columns_;
      const int64_t* channels = channels_ + column;
      for (int64_t j = 0; j < count; ++j) {
        __builtin_prefetch(next + channels[j], 1);
        to[channels[j]] = from[j];
      }
    });
  }

  void* weight_;
  int64_t weight_columns_;
  const int64_t* channels_;
  int64_t columns_, dim_;
  DType dtype_;
  int64_t bytes_;
};

}  // namespace peft_kernels
