// Parameter competition balancing on the CPU: counts of scores, from which its thresholds follow, and the merge by
// them.
#include "delta_merge.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

namespace peft_kernels {
namespace {

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
  m.impl("delta_count_scores_", TORCH_BOX(&peft_kernels::count_scores_));
  m.impl("delta_compete", TORCH_BOX(&peft_kernels::compete));
}
