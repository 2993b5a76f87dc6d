// The positions of the `count` largest rows[n] columns[k] but for the excluded ones, in order; ties go to the smaller
// position. The product, float32, is formed again wherever it is looked at and never stored.
//
// The count-th largest is found digit by digit, as non-negative floats have the order of their bits: a histogram of 11
// bits of all products, less that of the excluded ones, says which digit it has, and the next round counts within that
// digit only. After three rounds the threshold is known to its last bit, and how many of those equal to it are wanted.
// Then each row counts what it has above the threshold and at it, sums over the rows say where its results belong, and
// the rows write them.
//
// Bytes: 4 (N + K), 8 to 16 per excluded entry and round, 8 per result. Operations: some ten per element of the product
// in each of five passes, which bounds it: 5 x 10 x 59 million at 4096 x 14336, less than a millisecond on a large GPU
// [calculated]. Sorting both factors and bisecting, as on the CPU, reads less and waits more.
#include <cuda_runtime.h>
#include <launch.cuh>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>

#include "../common/sparse_checks.h"
#include "indices.h"
#include "running_sums.h"
#include "tile.h"

namespace peft_kernels {
namespace {

constexpr bool kTakesFloat64 = false;
constexpr int kThreads = 256, kWarps = kThreads / kLanes;

// Digits of the 31 bits of a magnitude, the highest first.
constexpr int kRounds = 3, kDigitBits = 11, kDigits = 1 << kDigitBits;
constexpr int kShifts[kRounds] = {20, 9, 0};
constexpr int kLastDigitBits = 9;

struct Factors {
  const float *rows, *columns;
  int64_t row_count, column_count;
};

// The order of magnitudes is that of these integers.
__device__ __forceinline__ uint32_t product_bits(float row, float column) {
  return __float_as_uint(__fmul_rn(row, column)) & 0x7FFFFFFFu;
}

// --- the first number that is no factor ---

struct CheckArguments {
  Factors factors;
  unsigned long long* wrong;  // how many numbers of rows and columns are left from it on; 0: there is none
};

__global__ void __launch_bounds__(kThreads) check_factors_kernel(const __grid_constant__ CheckArguments a) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t left = a.factors.row_count + a.factors.column_count - index;
  if (left <= 0) return;
  const float value =
      index < a.factors.row_count ? a.factors.rows[index] : a.factors.columns[index - a.factors.row_count];
  const bool good = value >= 0.0f && value <= std::numeric_limits<float>::max();  // NaN is neither
  if (!good) atomicMax(a.wrong, static_cast<unsigned long long>(left));
}

// --- the threshold ---

// What is known of the threshold: its upper digits, and how many of the products that share them reach it.
struct Threshold {
  unsigned long long wanted;
  uint32_t digits;
};

struct HistogramArguments {
  Factors factors;
  IndicesView exclude;
  int64_t excluded;
  const Threshold* threshold;
  int shift;       // of the digit of this round
  unsigned upper;  // of the digits before; 31 in the first round, which leaves nothing of a magnitude
  unsigned digit_mask;
  unsigned long long* counts;  // [kDigits], zero before the products and the excluded ones
};

constexpr int kThreadColumns = 16, kBlockColumns = kThreads * kThreadColumns;

// Grid: some rows each, blocks of columns. A thread keeps its columns for all rows.
__global__ void __launch_bounds__(kThreads, 4) product_histogram_kernel(const __grid_constant__ HistogramArguments a) {
  __shared__ unsigned counts[kDigits];
  const int thread = static_cast<int>(threadIdx.x);
  for (int digit = thread; digit < kDigits; digit += kThreads) counts[digit] = 0;
  const int64_t first = int64_t{blockIdx.y} * kBlockColumns + thread;
  float columns[kThreadColumns];
#pragma unroll
  for (int i = 0; i < kThreadColumns; ++i) {
    const int64_t column = first + i * kThreads;
    columns[i] = column < a.factors.column_count ? a.factors.columns[column] : 0.0f;
  }
  const uint32_t digits = a.threshold->digits;
  __syncthreads();
  const int64_t rows = first < a.factors.column_count ? a.factors.row_count : 0;  // none for a thread without columns
#pragma unroll 1
  for (int64_t n = blockIdx.x; n < rows; n += gridDim.x) {
    const float row = a.factors.rows[n];
#pragma unroll
    for (int i = 0; i < kThreadColumns; ++i) {
      const uint32_t bits = product_bits(row, columns[i]);
      if (first + i * kThreads < a.factors.column_count && bits >> a.upper == digits) {
        atomicAdd(counts + (bits >> a.shift & a.digit_mask), 1u);
      }
    }
  }
  __syncthreads();
  for (int digit = thread; digit < kDigits; digit += kThreads) {
    if (counts[digit] > 0) atomicAdd(a.counts + digit, static_cast<unsigned long long>(counts[digit]));
  }
}

__global__ void __launch_bounds__(kThreads) excluded_histogram_kernel(const __grid_constant__ HistogramArguments a) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= a.excluded) return;
  const int64_t position = a.exclude[entry], row = position / a.factors.column_count;
  const uint32_t bits = product_bits(a.factors.rows[row], a.factors.columns[position - row * a.factors.column_count]);
  // Modulo 2^64 the order of additions and subtractions does not matter.
  if (bits >> a.upper == a.threshold->digits) atomicAdd(a.counts + (bits >> a.shift & a.digit_mask), ~0ull);
}

struct DigitArguments {
  Threshold* threshold;
  unsigned long long* counts;  // zero again afterwards
  int digit_bits;
  unsigned long long wanted;  // in the first round; then 0, as the threshold says it
};

// One warp; each lane has 64 neighboring digits, the first lane the largest ones.
__global__ void __launch_bounds__(kLanes) choose_digit_kernel(const __grid_constant__ DigitArguments a) {
  constexpr int kOwn = kDigits / kLanes;
  const int lane = static_cast<int>(threadIdx.x), top = kDigits - 1 - lane * kOwn;
  unsigned long long own = 0;
  for (int i = 0; i < kOwn; ++i) own += a.counts[top - i];
  unsigned long long through = own;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const unsigned long long other = __shfl_up_sync(~0u, through, distance);
    if (lane >= distance) through += other;
  }
  const uint32_t digits = a.threshold->digits;
  const unsigned long long wanted = a.wanted > 0 ? a.wanted : a.threshold->wanted;
  __syncwarp();  // all have read it
  unsigned long long above = through - own;
  if (above < wanted && wanted <= through) {
    int digit = top;
    while (above + a.counts[digit] < wanted) above += a.counts[digit--];
    *a.threshold = {wanted - above, digits << a.digit_bits | static_cast<uint32_t>(digit)};
  }
  for (int i = 0; i < kOwn; ++i) a.counts[top - i] = 0;
}

// --- the results ---

struct SelectArguments {
  Factors factors;
  IndicesView exclude;
  int64_t excluded;
  const Threshold* threshold;
  int64_t *above, *ties;                        // [N]: how many a row has
  const int64_t *above_through, *ties_through;  // [N]: up to and with the row
  int64_t* positions;                           // [count]
};

// A warp takes a row. First it counts, then, `write`, it knows where its results go.
template <bool write>
__global__ void __launch_bounds__(kThreads) select_products_kernel(const __grid_constant__ SelectArguments a) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (n >= a.factors.row_count) return;
  const int64_t origin = n * a.factors.column_count;
  int64_t bound = 0;
  if (lane < 2) bound = lower_bound(a.exclude, 0, a.excluded, origin + lane * a.factors.column_count);
  const int64_t first_excluded = __shfl_sync(~0u, bound, 0), last_excluded = __shfl_sync(~0u, bound, 1);
  const uint32_t threshold = a.threshold->digits;
  const auto wanted_ties = static_cast<int64_t>(a.threshold->wanted);
  const float row = a.factors.rows[n];
  int64_t above = 0, ties = 0;  // before the columns that are looked at
  if constexpr (write) {
    if (a.above[n] + a.ties[n] == 0) return;
    above = a.above_through[n] - a.above[n];
    ties = a.ties_through[n] - a.ties[n];
  }
#pragma unroll 1
  for (int64_t first = 0; first < a.factors.column_count; first += kLanes) {
    const int64_t k = first + lane, position = origin + k;
    const uint32_t bits = k < a.factors.column_count ? product_bits(row, a.factors.columns[k]) : 0;
    bool reaches = k < a.factors.column_count && bits >= threshold;
    if (reaches && first_excluded < last_excluded) {
      const int64_t place = lower_bound(a.exclude, first_excluded, last_excluded, position);
      reaches = place == last_excluded || a.exclude[place] != position;
    }
    const uint32_t found_above = __ballot_sync(~0u, reaches && bits > threshold);
    const uint32_t found_ties = __ballot_sync(~0u, reaches && bits == threshold);
    if constexpr (write) {
      const uint32_t lanes_before = (1u << lane) - 1;
      const int64_t tie = ties + __popc(found_ties & lanes_before);
      const int64_t taken = tie < wanted_ties ? tie : wanted_ties;
      const bool own = (found_above >> lane & 1) || ((found_ties >> lane & 1) && tie < wanted_ties);
      if (own) a.positions[above + __popc(found_above & lanes_before) + taken] = position;
    }
    above += __popc(found_above);
    ties += __popc(found_ties);
  }
  if (!write && lane == 0) {
    a.above[n] = above;
    a.ties[n] = ties;
  }
}

int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Waits for the GPU: a wrong number must be told before anything follows from it.
void check_factor_numbers(const char* op, const Factors& factors, const Tensor& rows, const Tensor& columns) {
  const int64_t numbers = factors.row_count + factors.column_count;
  const Tensor wrong = torch::stable::new_zeros(rows, {1}, ScalarType::Long);
  const CheckArguments a = {factors, static_cast<unsigned long long*>(wrong.mutable_data_ptr())};
  launch(
      op, {.x = divide_up(numbers, kThreads), .threads = kThreads}, check_factors_kernel, a,
      {{"rows", rows}, {"columns", columns}, {"wrong", wrong, Access::write}});
  const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
  const int64_t left = *static_cast<const int64_t*>(torch::stable::to(wrong, host).const_data_ptr());
  if (left == 0) return;
  const int64_t at = numbers - left;
  const bool of_rows = at < factors.row_count;
  Tensor factor = of_rows ? rows : columns;
  const int64_t place = of_rows ? at : at - factors.row_count;
  const Tensor number = torch::stable::to(torch::stable::narrow(factor, 0, place, 1), host);
  STD_TORCH_CHECK(
      false, op, ": ", of_rows ? "rows" : "columns", " must be finite and at least 0, got ",
      *static_cast<const float*>(number.const_data_ptr()), " at position ", place);
}

// A Threshold in two int64: the count-th largest product and how many of those equal to it are wanted.
Tensor find_threshold(
    const char* op, const Factors& factors, const Tensor& rows, const Tensor& columns, int64_t count,
    const Tensor& exclude) {
  static_assert(sizeof(Threshold) == 2 * sizeof(int64_t));
  const Tensor threshold = torch::stable::new_zeros(rows, {2}, ScalarType::Long);
  const Tensor counts = torch::stable::new_zeros(rows, {kDigits}, ScalarType::Long);
  HistogramArguments a = {};
  a.factors = factors;
  a.exclude = indices_view(exclude);
  a.excluded = exclude.numel();
  a.threshold = static_cast<const Threshold*>(threshold.const_data_ptr());
  a.counts = static_cast<unsigned long long*>(counts.mutable_data_ptr());
  constexpr int64_t kMostBlocks = 1024;
  const Grid products = {
      .x = factors.row_count < kMostBlocks ? factors.row_count : kMostBlocks,
      .y = divide_up(factors.column_count, kBlockColumns),
      .threads = kThreads};
  for (int round = 0; round < kRounds; ++round) {
    const int digit_bits = round + 1 < kRounds ? kDigitBits : kLastDigitBits;
    a.shift = kShifts[round];
    a.upper = static_cast<unsigned>(kShifts[round] + digit_bits);
    a.digit_mask = (1u << digit_bits) - 1;
    launch(
        op, products, product_histogram_kernel, a,
        {{"rows", rows}, {"columns", columns}, {"threshold", threshold}, {"counts", counts, Access::write}});
    if (a.excluded > 0) {
      launch(
          op, {.x = divide_up(a.excluded, kThreads), .threads = kThreads}, excluded_histogram_kernel, a,
          {{"rows", rows},
           {"columns", columns},
           {"exclude", exclude},
           {"threshold", threshold},
           {"counts", counts, Access::write}});
    }
    const DigitArguments digit = {
        static_cast<Threshold*>(threshold.mutable_data_ptr()), a.counts, digit_bits,
        round == 0 ? static_cast<unsigned long long>(count) : 0};
    launch(
        op, {.threads = kLanes}, choose_digit_kernel, digit,
        {{"threshold", threshold, Access::write}, {"counts", counts, Access::write}});
  }
  return threshold;
}

Tensor outer_product_topk(const Tensor& rows, const Tensor& columns, int64_t count, const Tensor& exclude) {
  constexpr const char* op = "outer_product_topk";
  check_outer_product(op, rows, columns, count, exclude, kTakesFloat64);
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const Tensor own_rows = torch::stable::contiguous(rows), own_columns = torch::stable::contiguous(columns);
  const Factors factors = {
      static_cast<const float*>(own_rows.const_data_ptr()), static_cast<const float*>(own_columns.const_data_ptr()),
      rows.numel(), columns.numel()};
  Tensor positions = torch::stable::new_empty(rows, {count}, ScalarType::Long);
  if (factors.row_count + factors.column_count > 0) check_factor_numbers(op, factors, own_rows, own_columns);
  if (count == 0) return positions;
  const Tensor threshold = find_threshold(op, factors, own_rows, own_columns, count, exclude);
  const Tensor above = torch::stable::new_empty(rows, {factors.row_count}, ScalarType::Long);
  const Tensor ties = torch::stable::new_empty(above, {factors.row_count});
  SelectArguments a = {};
  a.factors = factors;
  a.exclude = indices_view(exclude);
  a.excluded = exclude.numel();
  a.threshold = static_cast<const Threshold*>(threshold.const_data_ptr());
  a.above = static_cast<int64_t*>(above.mutable_data_ptr());
  a.ties = static_cast<int64_t*>(ties.mutable_data_ptr());
  const Grid grid = {.x = divide_up(factors.row_count, kWarps), .threads = kThreads};
  launch(
      op, grid, select_products_kernel<false>, a,
      {{"rows", own_rows},
       {"columns", own_columns},
       {"exclude", exclude},
       {"threshold", threshold},
       {"above", above, Access::write},
       {"ties", ties, Access::write}});
  const Tensor above_through = running_sums(above), ties_through = running_sums(ties);
  a.above_through = static_cast<const int64_t*>(above_through.const_data_ptr());
  a.ties_through = static_cast<const int64_t*>(ties_through.const_data_ptr());
  a.positions = static_cast<int64_t*>(positions.mutable_data_ptr());
  launch(
      op, grid, select_products_kernel<true>, a,
      {{"rows", own_rows},
       {"columns", own_columns},
       {"exclude", exclude},
       {"threshold", threshold},
       {"above", above},
       {"ties", ties},
       {"above_through", above_through},
       {"ties_through", ties_through},
       {"positions", positions, Access::write}});
  return positions;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("outer_product_topk", TORCH_BOX(&peft_kernels::outer_product_topk));
}
