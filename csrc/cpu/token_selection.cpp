// Scores of blocks of tokens and their selection on the CPU.
//
// Block scores never hold the [T, T] matrix. A task takes about kRegion queries, whole blocks of them, goes through the
// keys in front of them a region at a time and keeps the maximum of each pair of blocks; regions that no query sees are
// left out. Its sums over its blocks of queries go to partial [tasks, blocks], which is summed in order at the end. So
// work follows from the shape, and the bits are the same for any number of threads. Multiply-adds: B heads T^2 D / 2.
#include "../common/token_selection_checks.h"
#include "capability.h"
#include "delta.h"
#include "lora_checks.h"
#include "token_selection_kernels.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <string_view>
#include <tuple>

namespace peft_kernels {
namespace {

const TokenSelectionKernels& choose_table() {
#if defined(__x86_64__)
  const Capability capability = allowed_capability();
  if (capability >= Capability::avx512) return token_selection_kernels_avx512;
  if (capability == Capability::avx2) return token_selection_kernels_avx2;
#endif
  return token_selection_kernels_baseline;
}

TokenSelectionKernels choose_kernels() {
  TokenSelectionKernels table = choose_table();
#if defined(__x86_64__)
  if (std::string_view(kernels().capability) == "amx") {
    BlockScoresKernel& kernel = table.scores[static_cast<int>(DType::bf16)];
    const auto maxima = kernel.maxima;
    kernel = block_scores_amx_bf16;
    kernel.maxima = maxima;
  }
#endif
  return table;
}

HeadTokens tokens_of(const Tensor& tensor, int64_t batch, int64_t head, int64_t first, int64_t count) {
  const int64_t start = batch * tensor.stride(0) + head * tensor.stride(1) + first * tensor.stride(2);
  return {
      at(tensor.const_data_ptr(), tensor.element_size(), start), count, tensor.size(3), tensor.stride(2),
      tensor.stride(3)};
}

// NaN is larger than any number.
template <typename acc>
acc larger_of(acc most, acc value) {
  return value <= most || most != most ? most : value;
}

template <typename acc>
class BlockScores {
 public:
  BlockScores(
      const Tensor& q, const Tensor& k, int64_t block_size, const int32_t* starts, const BlockScoresKernel& kernel)
      : q_(q),
        k_(k),
        starts_(starts),
        kernel_(kernel),
        of_({q.size(1), k.size(1), q.size(3)}),
        batch_(q.size(0)),
        tokens_(q.size(2)),
        block_size_(block_size),
        blocks_(tokens_ / block_size),
        regions_(divide_up(blocks_ * block_size, kRegion)),
        task_rows_(block_size * std::max<int64_t>(1, kRegion / block_size)),
        tasks_(divide_up(tokens_, task_rows_)),
        region_bytes_(of_.key_value_heads * kernel.key_bytes(of_.depth)),
        keys_(batch_ * regions_ * region_bytes_),
        partial_(batch_ * tasks_ * blocks_ * sizeof(acc)) {}

  void into(acc* out) const {
    const int64_t work = kRegion * of_.depth * of_.key_value_heads;
    parallel_units(batch_ * regions_, 1, work, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) pack(unit / regions_, unit % regions_);
    });
    // Later queries see more keys, so an early task and a late one make a unit.
    const int64_t pairs = divide_up(tasks_, 2);
    parallel_units(
        batch_ * pairs, 1, task_rows_ * tokens_ * of_.heads * of_.depth / 8, [&](int64_t begin, int64_t end) {
          for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t early = unit % pairs, late = tasks_ - 1 - early;
            score(unit / pairs, early);
            if (late != early) score(unit / pairs, late);
          }
        });
    parallel_units(batch_, 1, tasks_ * blocks_, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        std::fill_n(out + b * blocks_, blocks_, acc(0));
        for (int64_t task = 0; task < tasks_; ++task) add(partial(b, task), out + b * blocks_);
      }
    });
  }

 private:
  acc* partial(int64_t batch, int64_t task) const {
    return static_cast<acc*>(partial_.get()) + (batch * tasks_ + task) * blocks_;
  }
  char* keys(int64_t batch, int64_t region) const { return at(keys_.get(), region_bytes_, batch * regions_ + region); }
  void add(const acc* from, acc* to) const {
    for (int64_t b = 0; b < blocks_; ++b) to[b] += from[b];
  }

  void pack(int64_t batch, int64_t region) const {
    const int64_t first = region * kRegion, count = std::min(kRegion, tokens_ - first);
    for (int64_t head = 0; head < of_.key_value_heads; ++head) {
      kernel_.pack_keys(
          tokens_of(k_, batch, head, first, count), at(keys(batch, region), kernel_.key_bytes(of_.depth), head));
    }
  }

  // The blocks of queries of a task.
  void score(int64_t batch, int64_t task) const {
    const int64_t begin = task * task_rows_, end = std::min(tokens_, begin + task_rows_);
    const int64_t query_blocks = divide_up(end - begin, block_size_);
    const Scratch most_memory(query_blocks * blocks_ * sizeof(acc));
    acc* most = static_cast<acc*>(most_memory.get());
    std::fill_n(most, query_blocks * blocks_, acc(0));
    const Scratch queries(of_.heads * kernel_.query_bytes(of_.depth)), scores(kRegion * kRegion * sizeof(acc));
    for (int64_t first = begin; first < end; first += kRegion) {
      const int64_t rows = std::min(kRegion, end - first);
      for (int64_t head = 0; head < of_.heads; ++head) {
        kernel_.pack_queries(
            tokens_of(q_, batch, head, first, rows), at(queries.get(), kernel_.query_bytes(of_.depth), head));
      }
      for (int64_t region = first_region(batch, first, rows); region < regions_; ++region) {
        if (region * kRegion >= first + rows) break;
        kernel_.multiply(queries.get(), keys(batch, region), of_, rows, scores.get());
        reduce(batch, begin, first, rows, region, static_cast<const acc*>(scores.get()), most);
      }
    }
    acc* to = partial(batch, task);
    std::fill_n(to, blocks_, acc(0));
    for (int64_t a = 0; a < query_blocks; ++a) add(most + a * blocks_, to);
  }

  int64_t first_region(int64_t batch, int64_t first, int64_t rows) const {
    if (starts_ == nullptr) return 0;
    const int32_t* start = starts_ + batch * tokens_ + first;
    return std::max<int64_t>(0, *std::min_element(start, start + rows)) / kRegion;
  }

  // The maxima of a region's pairs of blocks; `begin` is the first query of the task.
  void reduce(
      int64_t batch, int64_t begin, int64_t first, int64_t rows, int64_t region, const acc* scores, acc* most) const {
    const int64_t first_key = region * kRegion, keys = std::min(kRegion, blocks_ * block_size_ - first_key);
    int32_t seen_from[kRegion], seen_to[kRegion];
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t start = starts_ == nullptr ? 0 : starts_[batch * tokens_ + first + i] - first_key;
      seen_from[i] = static_cast<int32_t>(std::clamp<int64_t>(start, 0, kRegion));
      seen_to[i] = static_cast<int32_t>(std::clamp<int64_t>(first + i + 1 - first_key, 0, keys));
    }
    for (int64_t i = 0, last; i < rows; i = last) {
      const int64_t block = (first + i - begin) / block_size_;
      last = std::min(rows, begin + (block + 1) * block_size_ - first);
      alignas(64) acc largest[kRegion];
      kernel_.maxima(scores + i * kRegion, last - i, seen_from + i, seen_to + i, largest);
      acc* to = most + block * blocks_;
      for (int64_t j = 0; j < keys; ++j) {
        acc& cell = to[(first_key + j) / block_size_];
        cell = larger_of(cell, largest[j]);
      }
    }
  }

  const Tensor &q_, &k_;
  const int32_t* starts_;
  const BlockScoresKernel& kernel_;
  RegionHeads of_;
  int64_t batch_, tokens_, block_size_, blocks_, regions_, task_rows_, tasks_, region_bytes_;
  const Scratch keys_, partial_;
};

Tensor block_scores(Tensor q, Tensor k, int64_t block_size, std::optional<Tensor> starts) {
  check_block_scores("block_scores", q, k, block_size, starts, true);
  const DType dtype = dtype_of(q.scalar_type());
  Tensor out = new_tensor(q, {q.size(0), q.size(2) / block_size}, accumulation_type(dtype));
  if (out.numel() == 0) return out;
  static const TokenSelectionKernels table = choose_kernels();
  const BlockScoresKernel& kernel = table.scores[static_cast<int>(dtype)];
  const std::optional<Tensor> rows = starts.has_value() ? std::optional(as_contiguous(*starts)) : std::nullopt;
  const int32_t* first = rows.has_value() ? static_cast<const int32_t*>(rows->const_data_ptr()) : nullptr;
  if (dtype == DType::f64) {
    BlockScores<double>(q, k, block_size, first, kernel).into(static_cast<double*>(out.data_ptr()));
  } else {
    BlockScores<float>(q, k, block_size, first, kernel).into(static_cast<float*>(out.data_ptr()));
  }
  return out;
}

// Positions of the tokens of one sequence; returns how many.
template <typename acc>
int64_t select(
    const acc* scores, int64_t total, int64_t tokens, int64_t blocks, int64_t block_size, const acc* threshold,
    int32_t* positions) {
  const Scratch order_memory(total * sizeof(int32_t));
  int32_t* order = static_cast<int32_t*>(order_memory.get());
  for (int64_t b = 0; b < total; ++b) order[b] = static_cast<int32_t>(b);
  if (blocks < total) {
    std::nth_element(order, order + blocks, order + total, [&](int32_t left, int32_t right) {
      const acc a = scores[left], b = scores[right];
      const bool a_nan = std::isnan(a), b_nan = std::isnan(b);
      if (a_nan != b_nan) return a_nan;
      return a > b || (!(a < b) && left < right);  // also where both are NaN
    });
  }
  std::sort(order, order + blocks);
  int64_t count = 0;
  const auto take = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) positions[count++] = static_cast<int32_t>(t);
  };
  for (int64_t i = 0; i < blocks; ++i) {
    const acc score = scores[order[i]];
    if (threshold == nullptr || score >= *threshold || std::isnan(score)) {
      take(order[i] * block_size, (order[i] + 1) * block_size);
    }
  }
  take(total * block_size, tokens);
  return count;
}

template <typename acc>
void select_all(
    const Tensor& scores, int64_t tokens, int64_t blocks, int64_t block_size, const std::optional<Tensor>& threshold,
    const Tensor& positions, const Tensor& counts) {
  const acc* of_batch = static_cast<const acc*>(scores.const_data_ptr());
  const acc* limit = threshold.has_value() ? static_cast<const acc*>(threshold->const_data_ptr()) : nullptr;
  int32_t* to = static_cast<int32_t*>(positions.data_ptr());
  int32_t* found = static_cast<int32_t*>(counts.data_ptr());
  const int64_t total = scores.size(1), size = positions.size(1);
  parallel_units(scores.size(0), 1, 16 * total + size, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t count = select(of_batch + b * total, total, tokens, blocks, block_size, limit, to + b * size);
      std::fill(to + b * size + count, to + (b + 1) * size, -1);
      found[b] = static_cast<int32_t>(count);
    }
  });
}

std::tuple<Tensor, Tensor> select_tokens(
    Tensor scores, int64_t tokens, int64_t blocks, int64_t block_size, std::optional<Tensor> threshold) {
  check_select_tokens("select_tokens", scores, tokens, blocks, block_size, threshold, true);
  const int64_t size = blocks * block_size + tokens % block_size;
  Tensor positions = new_tensor(scores, {scores.size(0), size}, ScalarType::Int);
  Tensor counts = new_tensor(scores, {scores.size(0)}, ScalarType::Int);
  const Tensor rows = as_contiguous(scores);
  if (scores.scalar_type() == ScalarType::Double) {
    select_all<double>(rows, tokens, blocks, block_size, threshold, positions, counts);
  } else {
    select_all<float>(rows, tokens, blocks, block_size, threshold, positions, counts);
  }
  return {positions, counts};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("block_scores", TORCH_BOX(&peft_kernels::block_scores));
  m.impl("select_tokens", TORCH_BOX(&peft_kernels::select_tokens));
}
