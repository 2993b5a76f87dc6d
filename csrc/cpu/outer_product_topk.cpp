// The positions of the largest rows[n] columns[k] on the CPU, without the product of both.
//
// Rounding keeps the order of products, so with both factors sorted a walk along a staircase, N + K products, counts
// those that reach a threshold; bisecting the bits of the threshold finds the count-th largest exactly in 32 (64) of
// them. Of the excluded positions the products are formed once, and what the bisection has decided on is dropped. Then
// the rows that have results are scanned, a vector of products at a time. Time: N log N + K log K + 32 (N + K), twice
// the excluded, and a comparison for each product of a row with results.
#include "../common/sparse_checks.h"
#include "lora_products.h"
#include "parallel.h"
#include "selection_kernels.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

namespace peft_kernels {
namespace {

constexpr int64_t kScan = 2048;  // products at a time, in the first cache

inline void scale(const float* values, int64_t count, float factor, float* products) {
  selection_kernels().scale_f32(values, count, factor, products);
}
inline void scale(const double* values, int64_t count, double factor, double* products) {
  selection_kernels().scale_f64(values, count, factor, products);
}
inline int64_t above(const float* values, int64_t count, float threshold, uint32_t* places) {
  return selection_kernels().above_f32(values, count, threshold, places, nullptr);
}
inline int64_t above(const double* values, int64_t count, double threshold, uint32_t* places) {
  return selection_kernels().above_f64(values, count, threshold, places, nullptr);
}

template <typename acc>
void check_factor_numbers(const char* op, const char* name, const acc* factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(
        factor[i] >= acc(0) && factor[i] <= std::numeric_limits<acc>::max(), op, ": ", name,
        " must be finite and at least 0, got ", factor[i], " at position ", i);
  }
}

template <typename acc>
class OuterProduct {
 public:
  using Bits = std::conditional_t<sizeof(acc) == 4, uint32_t, uint64_t>;

  OuterProduct(const acc* rows, int64_t n, const acc* columns, int64_t k)
      : rows_(rows), columns_(columns), n_(n), k_(k), rows_memory_(n * sizeof(acc)), columns_memory_(k * sizeof(acc)) {
    std::copy_n(rows, n, sorted_rows());
    std::copy_n(columns, k, sorted_columns());
    std::sort(sorted_rows(), sorted_rows() + n);
    std::sort(sorted_columns(), sorted_columns() + k);
  }

  template <typename Index>
  void select(int64_t count, const Index* exclude, int64_t excluded, int64_t* positions) const {
    const acc threshold = kth_largest(count, exclude, excluded);
    // For each row: where its results start, then how many products equal to the threshold it may still take.
    const Scratch memory((2 * n_ + 1) * sizeof(int64_t));
    int64_t *starts = static_cast<int64_t*>(memory.get()), *ties = starts + n_ + 1;
    plan(threshold, count, exclude, excluded, starts, ties);
    parallel_units(n_, 1, k_ / 8 + 8, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        if (starts[row] == starts[row + 1]) continue;
        emit(row, threshold, ties[row], exclude, excluded, positions + starts[row], starts[row + 1] - starts[row]);
      }
    });
  }

 private:
  acc* sorted_rows() const { return static_cast<acc*>(rows_memory_.get()); }
  acc* sorted_columns() const { return static_cast<acc*>(columns_memory_.get()); }

  // How many products reach the threshold.
  int64_t count_from(acc threshold) const {
    int64_t count = 0, column = k_;
    for (int64_t row = 0; row < n_; ++row) {
      while (column > 0 && sorted_rows()[row] * sorted_columns()[column - 1] >= threshold) --column;
      count += k_ - column;
    }
    return count;
  }

  // The largest threshold that `count` products that are not excluded reach.
  template <typename Index>
  acc kth_largest(int64_t count, const Index* exclude, int64_t excluded) const {
    const Scratch memory(excluded * sizeof(acc));
    acc* products = static_cast<acc*>(memory.get());
    parallel_units(excluded, 64, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t position = static_cast<int64_t>(exclude[i]);
        products[i] = rows_[position / k_] * columns_[position % k_];
      }
    });
    // All products reach `low`, fewer than wanted reach `high`; of the excluded ones between the two `open` are left,
    // and `decided` reach `high`.
    Bits low = 0, high = std::bit_cast<Bits>(std::numeric_limits<acc>::infinity()) + 1;
    int64_t open = excluded, decided = 0;
    while (high - low > 1) {
      const Bits middle = low + (high - low) / 2;
      const acc threshold = std::bit_cast<acc>(middle);
      const int64_t reaching = std::count_if(products, products + open, [&](acc p) { return p >= threshold; });
      const bool enough = count_from(threshold) - decided - reaching >= count;
      (enough ? low : high) = middle;
      if (!enough) decided += reaching;
      open = std::remove_if(products, products + open, [&](acc p) { return (p >= threshold) != enough; }) - products;
    }
    return std::bit_cast<acc>(low);
  }

  // How many of the columns, times `row`, reach the threshold, or lie beyond it.
  int64_t reaching(acc row, acc threshold, bool beyond) const {
    const acc *begin = sorted_columns(), *end = begin + k_;
    const acc* first = std::partition_point(
        begin, end, [&](acc column) { return beyond ? row * column <= threshold : row * column < threshold; });
    return end - first;
  }

  template <typename Index>
  void plan(
      acc threshold, int64_t count, const Index* exclude, int64_t excluded, int64_t* starts, int64_t* ties) const {
    // Above the threshold in starts, equal to it in ties.
    parallel_units(n_, 1, 512, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        starts[row] = reaching(rows_[row], threshold, true);
        ties[row] = reaching(rows_[row], threshold, false) - starts[row];
      }
    });
    for (int64_t i = 0; i < excluded; ++i) {
      const int64_t row = static_cast<int64_t>(exclude[i]) / k_, column = static_cast<int64_t>(exclude[i]) % k_;
      const acc product = rows_[row] * columns_[column];
      starts[row] -= product > threshold;
      ties[row] -= product == threshold;
    }
    int64_t rest = count;
    for (int64_t row = 0; row < n_; ++row) rest -= starts[row];
    int64_t total = 0;
    for (int64_t row = 0; row < n_; ++row) {
      ties[row] = std::min(ties[row], rest);
      rest -= ties[row];
      const int64_t own = starts[row] + ties[row];
      starts[row] = total;
      total += own;
    }
    starts[n_] = total;
  }

  // The results of a row, `room` of them, in order.
  template <typename Index>
  void emit(int64_t row, acc threshold, int64_t ties, const Index* exclude, int64_t excluded, int64_t* to, int64_t room)
      const {
    acc products[kScan];
    uint32_t places[kScan];
    const int64_t base = row * k_;
    const Index* last = exclude + excluded;
    const Index* without =
        std::partition_point(exclude, last, [&](Index index) { return static_cast<int64_t>(index) < base; });
    int64_t done = 0;
    for (int64_t first = 0; first < k_ && done < room; first += kScan) {
      const int64_t some = std::min(kScan, k_ - first);
      scale(columns_ + first, some, rows_[row], products);
      const int64_t found = above(products, some, threshold, places);
      for (int64_t i = 0; i < found && done < room; ++i) {
        const int64_t position = base + first + places[i];
        while (without < last && static_cast<int64_t>(*without) < position) ++without;
        if (without < last && static_cast<int64_t>(*without) == position) continue;
        if (products[places[i]] == threshold && ties-- <= 0) continue;
        to[done++] = position;
      }
    }
  }

  const acc *rows_, *columns_;
  int64_t n_, k_;
  Scratch rows_memory_, columns_memory_;
};

template <typename acc>
void select(
    const char* op, const Tensor& rows, const Tensor& columns, int64_t count, const Tensor& exclude,
    const Tensor& positions) {
  const acc* row = static_cast<const acc*>(rows.const_data_ptr());
  const acc* column = static_cast<const acc*>(columns.const_data_ptr());
  check_factor_numbers(op, "rows", row, rows.numel());
  check_factor_numbers(op, "columns", column, columns.numel());
  if (count == 0) return;
  const OuterProduct<acc> product(row, rows.numel(), column, columns.numel());
  int64_t* to = static_cast<int64_t*>(positions.data_ptr());
  if (exclude.scalar_type() == ScalarType::Int) {
    product.select(count, static_cast<const int32_t*>(exclude.const_data_ptr()), exclude.numel(), to);
  } else {
    product.select(count, static_cast<const int64_t*>(exclude.const_data_ptr()), exclude.numel(), to);
  }
}

Tensor outer_product_topk(Tensor rows, Tensor columns, int64_t count, Tensor exclude) {
  constexpr const char* op = "outer_product_topk";
  check_outer_product(op, rows, columns, count, exclude, true);
  const Tensor own_rows = as_contiguous(rows), own_columns = as_contiguous(columns);
  Tensor positions = new_tensor(rows, {count}, ScalarType::Long);
  if (rows.scalar_type() == ScalarType::Double) {
    select<double>(op, own_rows, own_columns, count, exclude, positions);
  } else {
    select<float>(op, own_rows, own_columns, count, exclude, positions);
  }
  return positions;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("outer_product_topk", TORCH_BOX(&peft_kernels::outer_product_topk));
}
