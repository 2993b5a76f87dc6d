// What a delta keeps by magnitude, on the CPU: counts of keys, from which a cut follows, and the masks between two
// cuts, of all entries or row by row.
#include "delta_entries.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <limits>
#include <optional>
#include <vector>

namespace peft_kernels {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

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

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("delta_count_keys_", TORCH_BOX(&peft_kernels::count_keys_));
  m.impl("delta_magnitude_mask", TORCH_BOX(&peft_kernels::magnitude_mask));
  m.impl("delta_row_mask", TORCH_BOX(&peft_kernels::row_mask));
}
