// The delta algebra on the CPU: argument checks first, then the kernels of delta_kernels.h in threads; registration.
//
// Work is split by positions, never by threads, and counts are integers: the same bits for any number of threads.
#include "../common/delta_checks.h"
#include "capability.h"
#include "delta_kernels.h"
#include "lora_products.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace peft_kernels {
namespace {

using Pair = std::tuple<Tensor, Tensor>;
using Arithmetic = DeltaKernels::Arithmetic;

constexpr int64_t kSplit = 64 * kRun;  // positions or entries that a thread takes at a time
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

const DeltaKernels& choose_delta_kernels() {
#if defined(__x86_64__)
  const Capability capability = allowed_capability();
  if (capability >= Capability::avx512) return delta_kernels_avx512;
  if (capability == Capability::avx2) return delta_kernels_avx2;
#endif
  return delta_kernels_baseline;
}

const DeltaKernels& delta_kernels() {
  static const DeltaKernels& table = choose_delta_kernels();
  return table;
}

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

// --- counting ---

void count_keys_(Tensor counts, Tensor values, bool wide, int64_t shift, int64_t bits, int64_t prefix) {
  constexpr const char* op = "delta_count_keys_";
  check_floating(op, "values", values, true);
  check_flat(op, "values", values);
  check_bins(op, shift, bits, wide ? 63 : 31);
  check_counts(op, counts, 1, bits, values);
  const Arithmetic& in = delta_kernels().in[wide];
  const Values from(values, wide);
  const Bins bins = {
      static_cast<int>(shift), static_cast<int>(bits), static_cast<uint64_t>(prefix), shift + bits == (wide ? 63 : 31)};
  const int64_t size = int64_t{1} << bits, parts = divide_up(values.numel(), kSplit);
  // Few partial tables, each of many parts: a table has to be cleared and added too. 2^32 values fit in each.
  const int64_t tables = std::max<int64_t>(1, std::min<int64_t>(16, divide_up(parts, 64)));
  const int64_t split = divide_up(divide_up(values.numel(), tables), kRun) * kRun;
  STD_TORCH_CHECK(
      split < (int64_t{1} << 32), op, ": values must have fewer than 2^36 elements, got ", described(values));
  const Scratch partial(tables * size * sizeof(uint32_t));
  uint32_t* tally = static_cast<uint32_t*>(partial.get());
  torch::stable::parallel_for(0, tables, 1, [&](int64_t first, int64_t last) {
    for (int64_t table = first; table < last; ++table) {
      uint32_t* own = tally + table * size;
      std::memset(own, 0, size * sizeof(uint32_t));
      alignas(64) double run[kRun];
      each_run(table * split, std::min(values.numel(), (table + 1) * split), [&](int64_t begin, int64_t end) {
        from.read(begin, end, run);
        in.count(run, end - begin, bins, own);
      });
    }
  });
  int64_t* total = static_cast<int64_t*>(counts.mutable_data_ptr());
  for (int64_t table = 0; table < tables; ++table) {
    for (int64_t bin = 0; bin < size; ++bin) total[bin] += tally[table * size + bin];
  }
}

// --- masks ---

// The top of an order by magnitude: all keys above `key`, and the first `ties` of those equal to it.
struct Cut {
  uint64_t key;
  int64_t ties;
};

// Takes away from mask entries [begin, end) what of the ties at the cuts goes beyond them; `first_seen` and `last_seen`
// count the ties before. The mask holds all ties at `last` and none at `first`.
template <typename Key>
void settle_ties(
    const Key* keys, int64_t count, const Cut& first, const Cut& last, int64_t first_seen, int64_t last_seen,
    bool* mask) {
  const Key first_key = static_cast<Key>(first.key), last_key = static_cast<Key>(last.key);
  for (int64_t i = 0; i < count; ++i) {
    if (keys[i] == last_key && last_seen++ >= last.ties) mask[i] = false;
    if (keys[i] == first_key && first_seen++ < first.ties) mask[i] = false;
  }
}

// mask = keys between the cuts. Ties at `first` count as kept by `between`, so that settle_ties() can take them away.
void mask_between(
    const Arithmetic& in, bool wide, const void* keys, int64_t count, const Cut& first, const Cut& last,
    int64_t first_seen, int64_t last_seen, bool* mask) {
  const bool all_first = first.ties == kNever, all_last = last.ties == kNever;
  in.between(keys, count, first.key, all_first, last.key, true, mask);
  if (all_first && all_last) return;
  if (wide) {
    settle_ties(static_cast<const uint64_t*>(keys), count, first, last, first_seen, last_seen, mask);
  } else {
    settle_ties(static_cast<const uint32_t*>(keys), count, first, last, first_seen, last_seen, mask);
  }
}

int64_t equal_to(const Arithmetic& in, const void* keys, int64_t count, uint64_t key) {
  return in.at_least(keys, count, key) - in.at_least(keys, count, key + 1);
}

Tensor magnitude_mask(
    Tensor values, bool wide, int64_t first_key, int64_t first_ties, int64_t last_key, int64_t last_ties) {
  constexpr const char* op = "delta_magnitude_mask";
  check_floating(op, "values", values, true);
  check_flat(op, "values", values);
  for (const int64_t key : {first_key, last_key}) {
    STD_TORCH_CHECK(
        key >= 0 && (wide || key < (int64_t{1} << 31)), op, ": first_key and last_key must be keys of ", wide ? 63 : 31,
        " bits, got ", key);
  }
  STD_TORCH_CHECK(
      first_ties >= 0 && last_ties >= 0, op, ": first_ties and last_ties must be at least 0, got ", first_ties, " and ",
      last_ties);
  Tensor mask = new_tensor(values, {values.numel()}, ScalarType::Bool);
  bool* to = static_cast<bool*>(mask.mutable_data_ptr());
  const Arithmetic& in = delta_kernels().in[wide];
  const Values from(values, wide);
  const Cut first = {static_cast<uint64_t>(first_key), first_ties}, last = {static_cast<uint64_t>(last_key), last_ties};
  const int64_t parts = divide_up(values.numel(), kSplit);
  std::vector<int64_t> first_seen(parts + 1), last_seen(parts + 1);
  const auto with_keys = [&](int64_t begin, int64_t end, const auto& body) {
    alignas(64) double run[kRun], keys[kRun];
    each_run(begin, end, [&](int64_t start, int64_t stop) {
      from.read(start, stop, run);
      in.keys(run, nullptr, stop - start, keys);
      body(start, stop, static_cast<const void*>(keys));
    });
  };
  const bool count_first = first_ties != kNever, count_last = last_ties != kNever;
  if (count_first || count_last) {
    parallel_parts(values.numel(), [&](int64_t part, int64_t begin, int64_t end) {
      int64_t at_first = 0, at_last = 0;
      with_keys(begin, end, [&](int64_t start, int64_t stop, const void* keys) {
        if (count_first) at_first += equal_to(in, keys, stop - start, first.key);
        if (count_last) at_last += equal_to(in, keys, stop - start, last.key);
      });
      first_seen[part + 1] = at_first;
      last_seen[part + 1] = at_last;
    });
    for (int64_t part = 0; part < parts; ++part) {
      first_seen[part + 1] += first_seen[part];
      last_seen[part + 1] += last_seen[part];
    }
  }
  parallel_parts(values.numel(), [&](int64_t part, int64_t begin, int64_t end) {
    int64_t at_first = first_seen[part], at_last = last_seen[part];
    with_keys(begin, end, [&](int64_t start, int64_t stop, const void* keys) {
      mask_between(in, wide, keys, stop - start, first, last, at_first, at_last, to + start);
      if (count_first) at_first += equal_to(in, keys, stop - start, first.key);
      if (count_last) at_last += equal_to(in, keys, stop - start, last.key);
    });
  });
  return mask;
}

// The cut behind the first `rank` of `count` keys; all ties go in where all do.
Cut cut_of_row(const Arithmetic& in, bool wide, const void* keys, int64_t count, int64_t rank) {
  const uint64_t above_all = wide ? uint64_t{1} << 63 : uint64_t{1} << 31;
  if (rank <= 0) return {above_all, kNever};
  if (rank >= count) return {0, kNever};
  uint64_t low = 0, high = above_all;  // at least `rank` keys are >= low, fewer are >= high
  while (high - low > 1) {
    const uint64_t middle = low + (high - low) / 2;
    const int64_t found = in.at_least(keys, count, middle);
    if (found == rank) return {middle, kNever};
    if (found > rank) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return {low, rank - in.at_least(keys, count, low + 1)};
}

Tensor row_mask(
    Tensor indices, Tensor values, std::optional<Tensor> factors, int64_t columns, bool wide, int64_t first,
    int64_t last) {
  constexpr const char* op = "delta_row_mask";
  const bool dense = check_delta(op, indices, values);
  check_ranks(op, first, last);
  STD_TORCH_CHECK(columns >= 1, op, ": columns must be at least 1, got ", columns);
  STD_TORCH_CHECK(
      !dense || values.numel() % columns == 0, op, ": values must be whole rows of ", columns, ", got ",
      described(values));
  const void* by = nullptr;
  if (factors.has_value()) {
    check_entries(op, "factors", *factors, columns, values);
    check_contiguous(op, "factors", *factors);
    STD_TORCH_CHECK(
        factors->scalar_type() == (wide ? ScalarType::Double : ScalarType::Float), op, ": factors must be ",
        wide ? "float64" : "float32", ", got ", described(*factors));
    by = factors->const_data_ptr();
  }
  Tensor mask = new_tensor(values, {values.numel()}, ScalarType::Bool);
  bool* to = static_cast<bool*>(mask.mutable_data_ptr());
  const Arithmetic& in = delta_kernels().in[wide];
  const Values from(values, wide);
  const Positions at(indices, dense);
  const int64_t count = values.numel(), bytes = wide ? 8 : 4;
  if (count == 0) return mask;
  const int64_t rows = at[count - 1] / columns + 1;
  const int64_t longest = std::min(count, columns);
  const int64_t grain = std::max<int64_t>(1, kSplit / columns);
  torch::stable::parallel_for(0, divide_up(rows, grain), 1, [&](int64_t first_block, int64_t last_block) {
    const Scratch memory(3 * round_up(longest * bytes, 64));
    char* run = static_cast<char*>(memory.get());
    char *keys = run + round_up(longest * bytes, 64), *own = keys + round_up(longest * bytes, 64);
    const int64_t end_row = std::min(rows, last_block * grain);
    int64_t begin = at.dense() ? 0 : at.lower_bound(0, count, first_block * grain * columns);
    for (int64_t row = first_block * grain; row < end_row; ++row) {
      int64_t end = begin;
      if (at.dense()) {
        begin = row * columns;
        end = begin + columns;
      } else {
        const int64_t limit = (row + 1) * columns;
        while (end < count && at[end] < limit) ++end;
      }
      if (begin == end) continue;
      from.read(begin, end, run);
      const void* scales = by;
      if (by != nullptr && !at.dense()) {
        for (int64_t i = begin; i < end; ++i) {
          std::memcpy(own + (i - begin) * bytes, static_cast<const char*>(by) + (at[i] - row * columns) * bytes, bytes);
        }
        scales = own;
      }
      in.keys(run, scales, end - begin, keys);
      const Cut from_cut = cut_of_row(in, wide, keys, end - begin, first);
      const Cut to_cut = cut_of_row(in, wide, keys, end - begin, last);
      mask_between(in, wide, keys, end - begin, from_cut, to_cut, 0, 0, to + begin);
      begin = end;
    }
  });
  return mask;
}

// mask[i] = bit i % 64 of words[i / 64].
void spread_bits(const uint64_t* words, int64_t count, bool* mask) {
  int64_t i = 0;
  if constexpr (std::endian::native == std::endian::little) {
    for (; i + 8 <= count; i += 8) {
      const uint64_t byte = words[i / 64] >> (i % 64) & 0xFF;
      // A copy of the byte in each of eight, of which copy j keeps bit j; adding 0x7F moves that to the top bit.
      const uint64_t own = byte * 0x0101010101010101u & 0x8040201008040201u;
      const uint64_t bytes = (own + 0x7F7F7F7F7F7F7F7Fu) >> 7 & 0x0101010101010101u;
      std::memcpy(mask + i, &bytes, sizeof(bytes));
    }
  }
  for (; i < count; ++i) mask[i] = words[i / 64] >> (i % 64) & 1;
}

Tensor random_mask(Tensor indices, Tensor values, int64_t columns, double dropout_p, Tensor rng_state) {
  constexpr const char* op = "delta_random_mask";
  const bool dense = check_delta(op, indices, values);
  STD_TORCH_CHECK(columns >= 1, op, ": columns must be at least 1, got ", columns);
  STD_TORCH_CHECK(
      dropout_p >= 0.0 && dropout_p <= 1.0, op, ": dropout_p must be in [0, 1], got ", dropout_p);  // NaN fails
  STD_TORCH_CHECK(
      rng_state.scalar_type() == ScalarType::Long && rng_state.dim() == 1 && rng_state.numel() == 2, op,
      ": rng_state must be int64 [2], got ", described(rng_state));
  check_device(op, "rng_state", rng_state, values);
  check_contiguous(op, "rng_state", rng_state);
  STD_TORCH_CHECK(
      !dense || values.numel() % columns == 0, op, ": values must be whole rows of ", columns, ", got ",
      described(values));
  Tensor mask = new_tensor(values, {values.numel()}, ScalarType::Bool);
  bool* to = static_cast<bool*>(mask.mutable_data_ptr());
  const int64_t count = values.numel();
  if (count == 0) return mask;
  const int64_t* state = static_cast<const int64_t*>(rng_state.const_data_ptr());
  Dropout dropout;
  dropout.active = true;
  dropout.state = {state[0], state[1]};
  dropout.threshold = dropout_threshold(dropout_p);
  const Positions at(indices, dense);
  const int64_t rows = at[count - 1] / columns + 1;
  const int64_t grain = std::max<int64_t>(1, kSplit / columns);
  torch::stable::parallel_for(0, divide_up(rows, grain), 1, [&](int64_t first_block, int64_t last_block) {
    const int64_t end_row = std::min(rows, last_block * grain);
    const Scratch memory(divide_up(columns, 64) * sizeof(uint64_t));
    uint64_t* words = static_cast<uint64_t*>(memory.get());
    if (at.dense()) {
      for (int64_t row = first_block * grain; row < end_row; ++row) {
        kernels().keep_words(words - row * divide_up(columns, 64), columns, row, row + 1, dropout);
        spread_bits(words, columns, to + row * columns);
      }
      return;
    }
    int64_t entry = at.lower_bound(0, count, first_block * grain * columns);
    const int64_t stop = at.lower_bound(entry, count, end_row * columns);
    int64_t drawn = -1;
    for (; entry < stop; ++entry) {
      const int64_t position = at[entry], row = position / columns, column = position - row * columns;
      if (row != drawn) {
        // keep_words() counts rows from `keep` on, so `keep` is where row 0 would be.
        kernels().keep_words(words - row * divide_up(columns, 64), columns, row, row + 1, dropout);
        drawn = row;
      }
      to[entry] = words[column / 64] >> (column % 64) & 1;
    }
  });
  return mask;
}

// --- packing ---

ScalarType index_type(int64_t numel) { return numel > (int64_t{1} << 31) - 1 ? ScalarType::Long : ScalarType::Int; }

template <typename Element>
void pick(const void* from, const int32_t* offsets, int64_t count, void* to) {
  const Element* source = static_cast<const Element*>(from);
  Element* target = static_cast<Element*>(to);
  for (int64_t i = 0; i < count; ++i) target[i] = source[offsets[i]];
}

void pick_elements(const void* from, const int32_t* offsets, int64_t count, int64_t bytes, void* to) {
  switch (bytes) {
    case 2:
      return pick<uint16_t>(from, offsets, count, to);
    case 4:
      return pick<uint32_t>(from, offsets, count, to);
    default:
      return pick<uint64_t>(from, offsets, count, to);
  }
}

// to[i] = begin + offsets[i], in indices of this size.
void place(int64_t begin, const int32_t* offsets, int64_t count, int64_t bytes, void* to) {
  if (bytes == 8) {
    for (int64_t i = 0; i < count; ++i) static_cast<int64_t*>(to)[i] = begin + offsets[i];
  } else {
    const int32_t first = static_cast<int32_t>(begin);
    for (int64_t i = 0; i < count; ++i) static_cast<int32_t*>(to)[i] = first + offsets[i];
  }
}

Pair compact(Tensor indices, Tensor values, Tensor mask, double factor) {
  constexpr const char* op = "delta_compact";
  const bool dense = check_delta(op, indices, values);
  check_mask(op, mask, values);
  const bool* kept = static_cast<const bool*>(mask.const_data_ptr());
  const int64_t count = values.numel(), parts = divide_up(count, kSplit);
  std::vector<int64_t> starts(parts + 1);
  parallel_parts(count, [&](int64_t part, int64_t begin, int64_t end) {
    int64_t n = 0;
    for (int64_t i = begin; i < end; ++i) n += kept[i];
    starts[part + 1] = n;
  });
  for (int64_t part = 0; part < parts; ++part) starts[part + 1] += starts[part];
  const ScalarType index_dtype = dense ? index_type(count) : indices.scalar_type();
  Tensor packed_indices = new_tensor(values, {starts[parts]}, index_dtype);
  Tensor packed_values = new_tensor(values, {starts[parts]}, values.scalar_type());
  const bool wide = values.scalar_type() == ScalarType::Double;
  const Values from(values, wide);
  const int64_t index_bytes = index_dtype == ScalarType::Long ? 8 : 4;
  const char* positions = dense ? nullptr : static_cast<const char*>(indices.const_data_ptr());
  char* to_indices = static_cast<char*>(packed_indices.mutable_data_ptr());
  char* to_values = static_cast<char*>(packed_values.mutable_data_ptr());
  const DeltaKernels& kernels = delta_kernels();
  const auto narrow = kernels.narrow[static_cast<int>(dtype_of(values.scalar_type()))][wide];
  parallel_parts(count, [&](int64_t part, int64_t begin, int64_t end) {
    alignas(64) double run[kRun];
    int32_t offsets[kOffsets];
    int64_t n = starts[part];
    each_run(begin, end, [&](int64_t first, int64_t last) {
      const int64_t size = last - first;
      char *index_target = to_indices + n * index_bytes, *value_target = to_values + n * from.bytes();
      const int64_t some = kernels.kept_offsets(kept + first, size, offsets);
      if (some == 0) return;
      pick_elements(from.at(first), offsets, some, from.bytes(), value_target);
      if (factor != 1.0) {
        kernels.widen[static_cast<int>(dtype_of(values.scalar_type()))][wide](value_target, run, some);
        kernels.in[wide].scale(run, some, factor);
        narrow(run, value_target, some);
      }
      if (positions != nullptr) {
        pick_elements(positions + first * index_bytes, offsets, some, index_bytes, index_target);
      } else {
        place(first, offsets, some, index_bytes, index_target);
      }
      n += some;
    });
  });
  return {packed_indices, packed_values};
}

// --- merging ---

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

void check_result_dtype(const char* op, ScalarType dtype) {
  STD_TORCH_CHECK(is_floating(dtype, true), op, ": dtype must be ", floating_names(true), ", got ", dtype_name(dtype));
}

void check_weights(const char* op, const std::vector<double>& weights, const std::vector<Tensor>& values) {
  STD_TORCH_CHECK(
      weights.size() == values.size(), op, ": weights must be a list as long as values, ", values.size(), ", got ",
      weights.size());
}

Pair sum(
    std::vector<Tensor> indices, std::vector<Tensor> values, std::vector<double> weights, int64_t numel,
    ScalarType dtype) {
  constexpr const char* op = "delta_sum";
  check_deltas(op, indices, values, numel);
  check_weights(op, weights, values);
  check_result_dtype(op, dtype);
  const Deltas deltas(indices, values);
  const Arithmetic& in = delta_kernels().in[deltas.wide()];
  return merge_with(deltas, values[0], numel, dtype, [&](const char* columns, int64_t count, void* merged) {
    in.sum(columns, deltas.size(), weights.data(), count, merged);
  });
}

Pair ties(
    std::vector<Tensor> indices, std::vector<Tensor> values, std::vector<double> weights, int64_t numel,
    ScalarType dtype) {
  constexpr const char* op = "delta_ties";
  check_deltas(op, indices, values, numel);
  check_weights(op, weights, values);
  check_result_dtype(op, dtype);
  for (const double weight : weights) {
    STD_TORCH_CHECK(weight > 0.0, op, ": weights must be above 0, got ", weight);
  }
  const Deltas deltas(indices, values);
  const Arithmetic& in = delta_kernels().in[deltas.wide()];
  return merge_with(deltas, values[0], numel, dtype, [&](const char* columns, int64_t count, void* merged) {
    in.ties(columns, deltas.size(), weights.data(), count, merged);
  });
}

// Rows of `of` [deltas, 5]: lowest, highest, threshold, winner, weight.
std::vector<Competition> competitions(const char* op, const Tensor& of, const std::vector<Tensor>& values) {
  const int64_t count = static_cast<int64_t>(values.size());
  check_device(op, "competition", of, values[0]);
  check_contiguous(op, "competition", of);
  STD_TORCH_CHECK(
      of.scalar_type() == ScalarType::Double && of.dim() == 2 && of.size(0) == count && of.size(1) == 5, op,
      ": competition must be float64 [", count, ", 5], got ", described(of));
  const double* row = static_cast<const double*>(of.const_data_ptr());
  std::vector<Competition> result;
  for (int64_t d = 0; d < count; ++d, row += 5) result.push_back({row[0], row[1], row[2], row[3], row[4]});
  return result;
}

void count_scores_(
    Tensor counts, Tensor largest, std::vector<Tensor> indices, std::vector<Tensor> values, Tensor competition,
    int64_t numel, int64_t shift, int64_t bits, std::vector<int64_t> prefixes) {
  constexpr const char* op = "delta_count_scores_";
  check_deltas(op, indices, values, numel);
  const std::vector<Competition> of = competitions(op, competition, values);
  const Deltas deltas(indices, values);
  const int key_bits = deltas.wide() ? 64 : 32;
  check_bins(op, shift, bits, key_bits);
  check_counts(op, counts, deltas.size(), bits, values[0]);
  check_entries(op, "largest", largest, deltas.size(), values[0]);
  check_contiguous(op, "largest", largest);
  STD_TORCH_CHECK(largest.scalar_type() == ScalarType::Long, op, ": largest must be int64, got ", described(largest));
  STD_TORCH_CHECK(
      prefixes.size() == values.size(), op, ": prefixes must be a list as long as values, ", values.size(), ", got ",
      prefixes.size());
  const Arithmetic& in = delta_kernels().in[deltas.wide()];
  const int64_t size = int64_t{1} << bits, all = deltas.size() * size;
  const int64_t tables = std::max<int64_t>(1, std::min<int64_t>(16, divide_up(numel, 64 * kSplit)));
  const int64_t split = divide_up(divide_up(numel, tables), kRun) * kRun;
  STD_TORCH_CHECK(split < (int64_t{1} << 32), op, ": numel must be below 2^36, got ", numel);
  const Scratch partial(tables * all * sizeof(uint32_t));
  uint32_t* tally = static_cast<uint32_t*>(partial.get());
  std::vector<uint64_t> most(tables * deltas.size(), 0);
  torch::stable::parallel_for(0, tables, 1, [&](int64_t first, int64_t last) {
    const Scratch memory(2 * deltas.size() * deltas.column_bytes());
    char *columns = static_cast<char*>(memory.get()), *scores = columns + deltas.size() * deltas.column_bytes();
    std::vector<int64_t> cursors(deltas.size());
    for (int64_t table = first; table < last; ++table) {
      uint32_t* own = tally + table * all;
      std::memset(own, 0, all * sizeof(uint32_t));
      const int64_t from = table * split, to = std::min(numel, (table + 1) * split);
      if (from >= to) continue;
      deltas.entries(from, to, cursors);
      each_run(from, to, [&](int64_t begin, int64_t end) {
        if (!deltas.lay_out(begin, end, cursors, columns)) return;
        in.scores(columns, deltas.size(), of.data(), end - begin, scores);
        for (int64_t d = 0; d < deltas.size(); ++d) {
          const Bins bins = {
              static_cast<int>(shift), static_cast<int>(bits), static_cast<uint64_t>(prefixes[d]),
              shift + bits == key_bits};
          uint64_t& found = most[table * deltas.size() + d];
          found = in.count_scores(
              columns + d * deltas.column_bytes(), scores + d * deltas.column_bytes(), end - begin, bins,
              own + d * size, found);
        }
      });
    }
  });
  int64_t* total = static_cast<int64_t*>(counts.mutable_data_ptr());
  int64_t* top = static_cast<int64_t*>(largest.mutable_data_ptr());
  for (int64_t table = 0; table < tables; ++table) {
    for (int64_t bin = 0; bin < all; ++bin) total[bin] += tally[table * all + bin];
    for (int64_t d = 0; d < deltas.size(); ++d) {
      // Keys of doubles have 64 bits: compared as what they are, carried as int64.
      const uint64_t found = most[table * deltas.size() + d];
      if (found > static_cast<uint64_t>(top[d])) top[d] = static_cast<int64_t>(found);
    }
  }
}

Pair compete(
    std::vector<Tensor> indices, std::vector<Tensor> values, Tensor competition, int64_t numel, ScalarType dtype) {
  constexpr const char* op = "delta_compete";
  check_deltas(op, indices, values, numel);
  check_result_dtype(op, dtype);
  const std::vector<Competition> of = competitions(op, competition, values);
  const Deltas deltas(indices, values);
  const Arithmetic& in = delta_kernels().in[deltas.wide()];
  return merge_with(deltas, values[0], numel, dtype, [&](const char* columns, int64_t count, void* merged) {
    const Scratch memory(deltas.size() * deltas.column_bytes());
    in.scores(columns, deltas.size(), of.data(), count, memory.get());
    in.compete(columns, memory.get(), deltas.size(), of.data(), count, merged);
  });
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("delta_count_keys_", TORCH_BOX(&peft_kernels::count_keys_));
  m.impl("delta_magnitude_mask", TORCH_BOX(&peft_kernels::magnitude_mask));
  m.impl("delta_row_mask", TORCH_BOX(&peft_kernels::row_mask));
  m.impl("delta_random_mask", TORCH_BOX(&peft_kernels::random_mask));
  m.impl("delta_compact", TORCH_BOX(&peft_kernels::compact));
  m.impl("delta_sum", TORCH_BOX(&peft_kernels::sum));
  m.impl("delta_ties", TORCH_BOX(&peft_kernels::ties));
  m.impl("delta_count_scores_", TORCH_BOX(&peft_kernels::count_scores_));
  m.impl("delta_compete", TORCH_BOX(&peft_kernels::compete));
}
