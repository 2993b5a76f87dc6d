// The entries of deltas as the operators of the delta algebra read them, and the parts they go through in threads.
//
// Work is split by positions, never by threads, and counts are integers: the same bits for any number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "../common/delta_checks.h"
#include "delta_kernels.h"
#include "lora_products.h"
#include "parallel.h"

namespace peft_kernels {

using Pair = std::tuple<Tensor, Tensor>;
using Arithmetic = DeltaKernels::Arithmetic;

constexpr int64_t kSplit = 64 * kRun;  // positions or entries that a thread takes at a time

// body(part, begin, end) for the parts of at most kSplit of [0, size), in threads.
template <typename F>
void parallel_parts(int64_t size, const F& body) {
  torch::stable::parallel_for(0, divide_up(size, kSplit), 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      body(part, part * kSplit, std::min(size, (part + 1) * kSplit));
    }
  });
}

// body(begin, end) for the runs of at most kRun of [begin, end).
template <typename F>
void each_run(int64_t begin, int64_t end, const F& body) {
  for (int64_t first = begin; first < end; first += kRun) body(first, std::min(end, first + kRun));
}

// The values of one tensor, read in float or double.
class Values {
 public:
  Values(const Tensor& values, bool wide)
      : data_(static_cast<const char*>(values.const_data_ptr())),
        bytes_(values.element_size()),
        widen_(delta_kernels().widen[static_cast<int>(dtype_of(values.scalar_type()))][wide]) {}

  void read(int64_t begin, int64_t end, void* to) const { widen_(data_ + begin * bytes_, to, end - begin); }
  const char* at(int64_t entry) const { return data_ + entry * bytes_; }
  int64_t bytes() const { return bytes_; }

 private:
  const char* data_;
  int64_t bytes_;
  void (*widen_)(const void*, void*, int64_t);
};

// Positions of entries; without a tensor those of every element.
class Positions {
 public:
  Positions(const Tensor& indices, bool dense)
      : data_(indices.const_data_ptr()), dense_(dense), wide_(indices.scalar_type() == ScalarType::Long) {}

  bool dense() const { return dense_; }
  int64_t operator[](int64_t entry) const {
    if (dense_) return entry;
    return wide_ ? static_cast<const int64_t*>(data_)[entry] : static_cast<const int32_t*>(data_)[entry];
  }
  // The first of entries [begin, end) whose position is at least `position`.
  int64_t lower_bound(int64_t begin, int64_t end, int64_t position) const {
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if ((*this)[middle] < position) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin;
  }

 private:
  const void* data_;
  bool dense_, wide_;
};

inline ScalarType index_type(int64_t numel) {
  return numel > (int64_t{1} << 31) - 1 ? ScalarType::Long : ScalarType::Int;
}

// to[i] = begin + offsets[i], in indices of this size.
inline void place(int64_t begin, const int32_t* offsets, int64_t count, int64_t bytes, void* to) {
  if (bytes == 8) {
    for (int64_t i = 0; i < count; ++i) static_cast<int64_t*>(to)[i] = begin + offsets[i];
  } else {
    const int32_t first = static_cast<int32_t>(begin);
    for (int64_t i = 0; i < count; ++i) static_cast<int32_t*>(to)[i] = first + offsets[i];
  }
}

}  // namespace peft_kernels
