// Several deltas of one tensor as one: laid out side by side a run of positions at a time, merged, packed.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <vector>

#include "delta_entries.h"

namespace peft_kernels {

// Several deltas of one tensor, laid out side by side a run of positions at a time, zero where they have no entry.
class Deltas {
 public:
  Deltas(const std::vector<Tensor>& indices, const std::vector<Tensor>& values) : wide_(false) {
    for (const Tensor& tensor : values) wide_ |= tensor.scalar_type() == ScalarType::Double;
    for (size_t d = 0; d < values.size(); ++d) {
      const bool dense = indices[d].numel() == 0 && values[d].numel() > 0;
      values_.emplace_back(values[d], wide_);
      positions_.emplace_back(indices[d], dense);
      counts_.push_back(values[d].numel());
    }
  }

  bool wide() const { return wide_; }
  int64_t size() const { return static_cast<int64_t>(values_.size()); }
  int64_t column_bytes() const { return kRun * (wide_ ? 8 : 4); }

  // How many entries all deltas have at positions [begin, end), and each one's first.
  int64_t entries(int64_t begin, int64_t end, std::vector<int64_t>& cursors) const {
    int64_t total = 0;
    for (int64_t d = 0; d < size(); ++d) {
      const Positions& at = positions_[d];
      cursors[d] = at.dense() ? begin : at.lower_bound(0, counts_[d], begin);
      total += (at.dense() ? end : at.lower_bound(cursors[d], counts_[d], end)) - cursors[d];
    }
    return total;
  }

  // Columns of positions [begin, end), at most kRun; false when no delta has an entry there. Moves the cursors on.
  bool lay_out(int64_t begin, int64_t end, std::vector<int64_t>& cursors, char* columns) const {
    bool any = false;
    for (int64_t d = 0; d < size(); ++d) {
      char* column = columns + d * column_bytes();
      const Positions& at = positions_[d];
      if (at.dense()) {
        values_[d].read(begin, end, column);
        any = true;
        continue;
      }
      std::memset(column, 0, (end - begin) * (wide_ ? 8 : 4));
      const int64_t first = cursors[d];
      int64_t last = first;
      const int64_t most = std::min(counts_[d], first + (end - begin));
      while (last < most && at[last] < end) ++last;
      if (last == first) continue;
      any = true;
      cursors[d] = last;
      alignas(64) double run[kRun];
      values_[d].read(first, last, run);
      if (wide_) {
        for (int64_t i = first; i < last; ++i) reinterpret_cast<double*>(column)[at[i] - begin] = run[i - first];
      } else {
        const float* narrow = reinterpret_cast<const float*>(run);
        for (int64_t i = first; i < last; ++i) reinterpret_cast<float*>(column)[at[i] - begin] = narrow[i - first];
      }
    }
    return any;
  }

 private:
  bool wide_;
  std::vector<Values> values_;
  std::vector<Positions> positions_;
  std::vector<int64_t> counts_;
};

// merge(columns, count, merged) for every run of positions where there are entries; what is not zero, packed.
template <typename F>
Pair merge_with(const Deltas& deltas, const Tensor& like, int64_t numel, ScalarType dtype, const F& merge) {
  const DeltaKernels& kernels = delta_kernels();
  const bool wide = deltas.wide();
  const int64_t parts = divide_up(numel, kSplit);
  // Where each part writes, as if no two deltas shared a position, and how much it wrote.
  std::vector<int64_t> starts(parts + 1), written(parts);
  parallel_parts(numel, [&](int64_t part, int64_t begin, int64_t end) {
    std::vector<int64_t> cursors(deltas.size());
    starts[part + 1] = std::min(end - begin, deltas.entries(begin, end, cursors));
  });
  for (int64_t part = 0; part < parts; ++part) starts[part + 1] += starts[part];
  const ScalarType index_dtype = index_type(numel);
  const int64_t index_bytes = index_dtype == ScalarType::Long ? 8 : 4;
  Tensor indices = new_tensor(like, {starts[parts]}, index_dtype);
  Tensor values = new_tensor(like, {starts[parts]}, dtype);
  const int64_t value_bytes = values.element_size();
  char* to_indices = static_cast<char*>(indices.mutable_data_ptr());
  char* to_values = static_cast<char*>(values.mutable_data_ptr());
  const auto narrow = kernels.narrow[static_cast<int>(dtype_of(dtype))][wide];
  parallel_parts(numel, [&](int64_t part, int64_t begin, int64_t end) {
    std::vector<int64_t> cursors(deltas.size());
    if (deltas.entries(begin, end, cursors) == 0) return;
    const Scratch memory(deltas.size() * deltas.column_bytes());
    char* columns = static_cast<char*>(memory.get());
    alignas(64) double merged[kRun];
    int32_t offsets[kOffsets];
    int64_t n = starts[part];
    each_run(begin, end, [&](int64_t first, int64_t last) {
      if (!deltas.lay_out(first, last, cursors, columns)) return;
      merge(columns, last - first, merged);
      const int64_t some = kernels.in[wide].gather_nonzero(merged, last - first, offsets);
      narrow(merged, to_values + n * value_bytes, some);
      place(first, offsets, some, index_bytes, to_indices + n * index_bytes);
      n += some;
    });
    written[part] = n - starts[part];
  });
  int64_t total = 0;
  for (int64_t part = 0; part < parts; ++part) total += written[part];
  if (total == starts[parts]) return {indices, values};
  // Where little is left over, the parts are moved together in place: a copy would need as much memory again.
  const bool in_place = total >= starts[parts] / 4 * 3;
  Tensor packed_indices =
      in_place ? torch::stable::narrow(indices, 0, 0, total) : new_tensor(like, {total}, index_dtype);
  Tensor packed_values = in_place ? torch::stable::narrow(values, 0, 0, total) : new_tensor(like, {total}, dtype);
  char* final_indices = static_cast<char*>(packed_indices.mutable_data_ptr());
  char* final_values = static_cast<char*>(packed_values.mutable_data_ptr());
  for (int64_t part = 0, n = 0; part < parts; n += written[part++]) {
    std::memmove(final_indices + n * index_bytes, to_indices + starts[part] * index_bytes, written[part] * index_bytes);
    std::memmove(final_values + n * value_bytes, to_values + starts[part] * value_bytes, written[part] * value_bytes);
  }
  return {packed_indices, packed_values};
}

inline void check_result_dtype(const char* op, ScalarType dtype) {
  STD_TORCH_CHECK(is_floating(dtype, true), op, ": dtype must be ", floating_names(true), ", got ", dtype_name(dtype));
}

}  // namespace peft_kernels
