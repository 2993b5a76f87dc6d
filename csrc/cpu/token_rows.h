// Rows of matrices that a list names: checked, gathered, added back. Shared by token_elimination.cpp and
// token_linear.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>

#include "../common/token_checks.h"
#include "lora_products.h"
#include "parallel.h"
#include "token_elimination_kernels.h"

namespace peft_kernels {

// A matrix as rows of neighboring elements.
class MatrixRows {
 public:
  explicit MatrixRows(const Tensor& matrix)
      : matrix_(with_unit_columns(matrix)),
        data_(static_cast<char*>(matrix_.data_ptr())),
        stride_(matrix_.stride(0) * matrix_.element_size()),
        bytes_(matrix_.size(1) * matrix_.element_size()) {}
  char* operator[](int64_t row) const { return data_ + row * stride_; }
  int64_t bytes() const { return bytes_; }  // of one row

 private:
  Tensor matrix_;
  char* data_;
  int64_t stride_, bytes_;
};

// A list of rows of a matrix with `total`. Here, where nothing must be waited for, they are looked at: a pass over them
// is nothing beside the rows that they move.
class RowList {
 public:
  // Any order: rows to read from.
  RowList(const char* op, const Tensor& rows, int64_t total)
      : rows_(as_contiguous(rows)), data_(static_cast<const int32_t*>(rows_.const_data_ptr())), count_(rows.numel()) {
    for (int64_t s = 0; s < count_; ++s) {
      STD_TORCH_CHECK(data_[s] < total, op, ": rows must be below ", total, ", got ", data_[s], " at position ", s);
    }
  }
  // Rows to add to: sorted and unique but for the negative ones, which may stand anywhere.
  static RowList sorted(const char* op, const Tensor& rows, int64_t total) {
    RowList list(op, rows, total);
    int64_t before = -1;
    for (int64_t s = 0; s < list.count_; ++s) {
      if (list[s] < 0) continue;
      STD_TORCH_CHECK(
          list[s] > before, op, ": rows must be sorted and unique, got ", list[s], " at position ", s, " after ",
          before);
      before = list[s];
    }
    return list;
  }
  int32_t operator[](int64_t s) const { return data_[s]; }
  int64_t count() const { return count_; }

 private:
  Tensor rows_;
  const int32_t* data_;
  int64_t count_;
};

// For each row of the matrix its place in the list, or -1: so that results are written from top to bottom.
class RowPlaces {
 public:
  RowPlaces(const RowList& list, int64_t total) : memory_(total * sizeof(int32_t)) {
    int32_t* places = static_cast<int32_t*>(memory_.get());
    std::memset(places, 0xFF, total * sizeof(int32_t));
    for (int64_t s = 0; s < list.count(); ++s) {
      if (list[s] >= 0) places[list[s]] = static_cast<int32_t>(s);
    }
    places_ = places;
  }
  int64_t operator[](int64_t row) const { return places_[row]; }

 private:
  Scratch memory_;
  const int32_t* places_;
};

// Elements moved per multiply-add of parallel.h's grain.
constexpr int64_t kWorkPerMove = 1;

// to [end - begin, C] = x[rows[begin:end]], with zeros where there is no row; in threads.
inline void gather_into(const MatrixRows& x, const RowList& rows, int64_t begin, int64_t end, const MatrixRows& to) {
  parallel_units(end - begin, 1, kWorkPerMove * x.bytes(), [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const int32_t row = rows[begin + s];
      row < 0 ? std::memset(to[s], 0, x.bytes()) : std::memcpy(to[s], x[row], x.bytes());
    }
  });
}

// out[begin:end] = residual[begin:end] with values added at their places; values begin with place `first_place`. In
// threads.
inline void scatter_add_into(
    const MatrixRows& residual, const MatrixRows& values, const RowPlaces& places, int64_t first_place, int64_t begin,
    int64_t end, const MatrixRows& out, int64_t columns, DType dtype) {
  const auto add = token_kernels().add[static_cast<int>(dtype)];
  parallel_units(end - begin, 1, kWorkPerMove * out.bytes(), [&](int64_t first, int64_t last) {
    for (int64_t row = begin + first; row < begin + last; ++row) {
      const int64_t place = places[row];
      if (place < 0) {
        std::memcpy(out[row], residual[row], out.bytes());
      } else {
        add(residual[row], values[place - first_place], out[row], columns);
      }
    }
  });
}

// Elements of `bytes` each, `stride` apart, to neighbors and back.
inline void copy_strided(
    char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t count, int64_t bytes) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * to_stride * bytes, from + i * from_stride * bytes, bytes);
}

// out[rows[begin:end]] += values, in place of an out with any strides; in threads.
inline void add_at(const Tensor& out, const RowList& rows, int64_t begin, int64_t end, const MatrixRows& values) {
  const int64_t columns = out.size(1), column_stride = columns <= 1 ? 1 : out.stride(1), bytes = out.element_size();
  const int64_t row_bytes = out.stride(0) * bytes;
  char* data = static_cast<char*>(out.data_ptr());
  const auto add = token_kernels().add[static_cast<int>(dtype_of(out.scalar_type()))];
  parallel_units(end - begin, 1, kWorkPerMove * columns * bytes, [&](int64_t first, int64_t last) {
    const Scratch memory(column_stride == 1 ? 0 : columns * bytes);
    char* sums = static_cast<char*>(memory.get());
    for (int64_t s = first; s < last; ++s) {
      if (rows[begin + s] < 0) continue;
      char* row = data + rows[begin + s] * row_bytes;
      if (column_stride == 1) {
        add(row, values[s], row, columns);
      } else {
        copy_strided(sums, 1, row, column_stride, columns, bytes);
        add(sums, values[s], sums, columns);
        copy_strided(row, column_stride, sums, 1, columns, bytes);
      }
    }
  });
}

}  // namespace peft_kernels
