// One slice of a weight [N, K] for another on the CPU: checks, then each line of the weight once; registration.
//
// Bytes: the lines of the weight that hold a channel of either slice, read and written; held, change and original once.
// At dim 1 lone channels touch most lines of a row, some 60 of its 96 with 46 + 46 of 1536 columns in float
// [calculated], and memory bounds it: the lines of a row are known, and are asked for while the rows before it are
// worked on.
#include "../common/slice_checks.h"
#include "lora_checks.h"
#include "slices.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

namespace peft_kernels {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kRowsAhead = 4;  // whose lines are on their way to the first-level cache, and fit it
constexpr int64_t kWorkPerEntry = 16;

struct Exchange {
  void* weight;
  int64_t rows, columns;   // N, K
  const int64_t* held_at;  // null: nothing is held
  const void* held;        // in weight's dtype, as original is
  int64_t held_count;
  const int64_t* channels;
  const void* change;
  void* original;
  int64_t count;
  int64_t bytes, change_bytes;  // of an element
  SparseKernels::Add add;
};

// Positions in a row, one for each line that holds a channel of either slice.
std::vector<int64_t> lines_of(const Exchange& x) {
  std::vector<int64_t> both(x.held_count + x.count);
  std::merge(x.held_at, x.held_at + x.held_count, x.channels, x.channels + x.count, both.begin());
  const int64_t elements = kLineBytes / x.bytes;
  const auto same = [=](int64_t left, int64_t right) { return left / elements == right / elements; };
  both.erase(std::unique(both.begin(), both.end(), same), both.end());
  return both;
}

template <typename Bits>
void scatter_row(const Bits* from, const int64_t* channels, int64_t count, Bits* row) {
  for (int64_t j = 0; j < count; ++j) row[channels[j]] = from[j];
}

// A chunk of the slice's rows at a time: what is read of them is added to as one run of numbers, when the stores that
// gathered it have long landed. Adding row by row would wait for those, and for the writes to the weight in front of
// them.
template <typename Bits>
void exchange_columns(const Exchange& x) {
  const std::vector<int64_t> lines = lines_of(x);
  Bits *weight = static_cast<Bits*>(x.weight), *original = static_cast<Bits*>(x.original);
  const Bits* held = static_cast<const Bits*>(x.held);
  const int64_t count = x.count, rows_at_once = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, count));
  const auto row = [&](int64_t m) { return weight + m * x.columns; };
  const auto read = [&](int64_t m) {
    if (m + kRowsAhead < x.rows) {
      for (const int64_t position : lines) __builtin_prefetch(row(m + kRowsAhead) + position, 1);
    }
    scatter_row(held + m * x.held_count, x.held_at, x.held_count, row(m));
    gather_row(row(m), 1, x.channels, count, original + m * count);
  };
  parallel_units(x.rows, 1, kWorkPerEntry * (x.held_count + count), [&](int64_t begin, int64_t end) {
    alignas(64) Bits sums[kChunk];
    for (int64_t first = begin, last; first < end; first = last) {
      last = std::min(end, first + rows_at_once);
      for (int64_t m = first; m < last; ++m) read(m);
      for (int64_t from = first * count, to; from < last * count; from = to) {  // once, but where a row is long
        to = std::min(last * count, from + kChunk);
        x.add(original + from, at(x.change, x.change_bytes, from), 1.0, to - from, sums);
        for (int64_t entry = from, next; entry < to; entry = next) {
          const int64_t m = entry / count;
          next = std::min(to, (m + 1) * count);
          scatter_row(sums + (entry - from), x.channels + (entry - m * count), next - entry, row(m));
        }
      }
    }
  });
}

// A row of the weight that either slice has, and where: -1 in the one that has it not.
struct SharedRow {
  int64_t row, held, changed;
};

// Both lists of channels ascend.
std::vector<SharedRow> rows_of(const Exchange& x) {
  std::vector<SharedRow> rows;
  rows.reserve(x.held_count + x.count);
  for (int64_t i = 0, j = 0; i < x.held_count || j < x.count;) {
    const bool held = j == x.count || (i < x.held_count && x.held_at[i] <= x.channels[j]);
    const bool changed = i == x.held_count || (j < x.count && x.channels[j] <= x.held_at[i]);
    rows.push_back({held ? x.held_at[i] : x.channels[j], held ? i++ : -1, changed ? j++ : -1});
  }
  return rows;
}

void exchange_rows(const Exchange& x) {
  const std::vector<SharedRow> rows = rows_of(x);
  const int64_t chunks = divide_up(x.columns, kChunk), size = static_cast<int64_t>(rows.size());
  parallel_units(size * chunks, 1, kWorkPerEntry * std::min(kChunk, x.columns), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const SharedRow& shared = rows[unit / chunks];
      const int64_t first = unit % chunks * kChunk, count = std::min(kChunk, x.columns - first);
      char* to = at(x.weight, x.bytes, shared.row * x.columns + first);
      const char* before = shared.held < 0 ? to : at(x.held, x.bytes, shared.held * x.columns + first);
      if (shared.changed < 0) {
        std::memcpy(to, before, x.bytes * count);
        continue;
      }
      const int64_t entry = shared.changed * x.columns + first;
      char* original = at(x.original, x.bytes, entry);
      std::memcpy(original, before, x.bytes * count);
      x.add(original, at(x.change, x.change_bytes, entry), 1.0, count, to);
    }
  });
}

void slice_exchange_(
    Tensor weight, std::optional<Tensor> held_indices, std::optional<Tensor> held, Tensor indices, Tensor change,
    Tensor original, int64_t dim) {
  check_slice_exchange("slice_exchange_", weight, held_indices, held, indices, change, original, dim, true);
  const Tensor changes = as_contiguous(change), kept = held.has_value() ? as_contiguous(*held) : original;
  Exchange x = {};
  x.weight = weight.data_ptr();
  x.rows = weight.size(0);
  x.columns = weight.size(1);
  if (held.has_value()) {
    x.held_at = channels_of(*held_indices);
    x.held = kept.const_data_ptr();
    x.held_count = held_indices->numel();
  }
  x.channels = channels_of(indices);
  x.change = changes.const_data_ptr();
  x.original = original.data_ptr();
  x.count = indices.numel();
  x.bytes = weight.element_size();
  x.change_bytes = changes.element_size();
  const DType dtype = dtype_of(weight.scalar_type()), change_dtype = dtype_of(changes.scalar_type());
  x.add = sparse_kernels().add[static_cast<int>(dtype)][static_cast<int>(change_dtype)];
  if (dim == 0) return exchange_rows(x);
  with_bits(x.bytes, [&](auto bits) { exchange_columns<decltype(bits)>(x); });
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("slice_exchange_", TORCH_BOX(&peft_kernels::slice_exchange_));
}
