// Set algebra on sorted arrays of positions, on the CPU.
//
// Bytes: each array once, and for a merge 8 for the source of each element. A comparison per element and no branch on
// its outcome; where one array is much the longer, a search per element of the other instead. Threads share the output
// in pieces of fixed length, whose start a search along the merge's diagonal finds; an array that is not sorted makes
// wrong results of it, but no access outside.
#include "../common/sparse_checks.h"
#include "lora_products.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

namespace peft_kernels {
namespace {

constexpr int64_t kPiece = 4096;       // elements of the output
constexpr int64_t kWorkPerEntry = 16;  // multiply-adds in the time of one element
constexpr int64_t kMuchLonger = 16;    // times the other: from here on a search is the faster way

// How many of the first `total` elements of the merge come from `first`.
template <typename Index>
int64_t from_first(const Index* first, int64_t n, const Index* second, int64_t m, int64_t total) {
  int64_t low = std::max<int64_t>(0, total - m), high = std::min(n, total);
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (first[middle] < second[total - middle - 1]) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <typename Index>
void merge(
    const Index* first, int64_t n, const Index* second, int64_t m, int64_t begin, int64_t end, Index* merged,
    int64_t* source) {
  int64_t i = from_first(first, n, second, m, begin), j = begin - i;
  for (int64_t at = begin; at < end;) {
    if (i == n || j == m) {
      const bool rest_of_first = j == m;
      const Index* from = rest_of_first ? first + i : second + j;
      const int64_t origin = rest_of_first ? i : n + j;
      for (int64_t e = 0; e < end - at; ++e) {
        merged[at + e] = from[e];
        source[at + e] = origin + e;
      }
      return;
    }
    // As many as neither array can run out within.
    const int64_t stop = at + std::min({n - i, m - j, end - at});
    for (; at < stop; ++at) {
      const Index a = first[i], b = second[j];
      const bool take = a < b;
      merged[at] = take ? a : b;
      source[at] = take ? i : n + j;
      i += take;
      j += !take;
    }
  }
}

template <typename Index>
void contains(const Index* indices, int64_t begin, int64_t end, const Index* other, int64_t m, bool* found) {
  const Index* last = other + m;
  const Index* at = std::lower_bound(other, last, indices[begin]);
  const Index* stop = std::upper_bound(at, last, indices[end - 1]);
  if (stop - at >= kMuchLonger * (end - begin)) {
    for (int64_t i = begin; i < end; ++i) {
      at = std::lower_bound(at, stop, indices[i]);
      found[i] = at < stop && *at == indices[i];
    }
    return;
  }
  int64_t i = begin;
  while (i < end && at < stop) {
    const int64_t steps = std::min<int64_t>(end - i, stop - at);
    for (int64_t step = 0; step < steps; ++step) {
      const Index index = indices[i], candidate = *at;
      found[i] = index == candidate;
      i += index <= candidate;
      at += candidate <= index;
    }
  }
  std::fill(found + i, found + end, false);
}

template <typename Index>
void merge_all(const Tensor& first, const Tensor& second, const Tensor& merged, const Tensor& source) {
  const int64_t n = first.numel(), m = second.numel();
  const Index* from = static_cast<const Index*>(first.const_data_ptr());
  const Index* other = static_cast<const Index*>(second.const_data_ptr());
  Index* to = static_cast<Index*>(merged.data_ptr());
  int64_t* origin = static_cast<int64_t*>(source.data_ptr());
  parallel_units(n + m, kPiece, kWorkPerEntry, [&](int64_t begin, int64_t end) {
    merge(from, n, other, m, begin, end, to, origin);
  });
}

template <typename Index>
void contains_all(const Tensor& indices, const Tensor& other, const Tensor& found) {
  const Index* of = static_cast<const Index*>(indices.const_data_ptr());
  const Index* in = static_cast<const Index*>(other.const_data_ptr());
  bool* to = static_cast<bool*>(found.data_ptr());
  parallel_units(indices.numel(), kPiece, kWorkPerEntry, [&](int64_t begin, int64_t end) {
    if (begin < end) contains(of, begin, end, in, other.numel(), to);
  });
}

std::tuple<Tensor, Tensor> sorted_merge(Tensor first, Tensor second) {
  check_sorted_pair("sorted_merge", "first", first, "second", second);
  const int64_t count = first.numel() + second.numel();
  Tensor merged = new_tensor(first, {count}, first.scalar_type());
  Tensor source = new_tensor(first, {count}, ScalarType::Long);
  if (first.scalar_type() == ScalarType::Int) {
    merge_all<int32_t>(first, second, merged, source);
  } else {
    merge_all<int64_t>(first, second, merged, source);
  }
  return {merged, source};
}

Tensor sorted_contains(Tensor indices, Tensor other) {
  check_sorted_pair("sorted_contains", "indices", indices, "other", other);
  Tensor found = new_tensor(indices, {indices.numel()}, ScalarType::Bool);
  if (indices.scalar_type() == ScalarType::Int) {
    contains_all<int32_t>(indices, other, found);
  } else {
    contains_all<int64_t>(indices, other, found);
  }
  return found;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("sorted_merge", TORCH_BOX(&peft_kernels::sorted_merge));
  m.impl("sorted_contains", TORCH_BOX(&peft_kernels::sorted_contains));
}
