// The cross entropy of rows for one instruction set. Compiled once per capability with -DPK_CAPABILITY=<name>; see
// simd.h.
//
// Two passes over a row, of which the first brings it into the second cache: the sum of exp of all that lies below the
// largest so far, a block at a time, and the gradient. Two exps for each logit, of some twelve instructions; a row of
// 49,152 in 16 bits is 96 KiB. Sums are of the accumulation type over a block, and of doubles over the blocks.
#include "cross_entropy_kernels.h"
#include "exponential.h"

#if !defined(PK_CAPABILITY)
#error "compile with -DPK_CAPABILITY=baseline|avx2|avx512"
#endif

namespace peft_kernels {
namespace {

constexpr int64_t kBlock = 2048;  // stays in the first cache between its maximum and its sum
constexpr int64_t kPart = 256;    // of a block
constexpr int kWays = 4;          // accumulators, so that none waits for itself

// The exp that results of type T need.
template <typename T>
inline VectorFor<T> exponential_for(VectorFor<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) return exponential<kShortTerms>(x);
#endif
  return exponential(x);
}

// The last `rest` numbers of a row, followed by numbers that change neither maximum nor sum.
template <typename T>
inline VectorFor<T> load_last(const T* from, int rest) {
  using acc = typename Accumulate<T>::type;
  VectorFor<T> value = load_partial(from, rest);
  for (int lane = rest; lane < kLanes<acc>; ++lane) value[lane] = -static_cast<acc>(__builtin_inff());
  return value;
}

// body(way, vector) for each vector of [begin, end).
template <typename T, typename F>
inline void for_each_vector(const T* x, int64_t begin, int64_t end, const F& body) {
  constexpr int lanes = kLanes<typename Accumulate<T>::type>;
  int64_t i = begin;
  for (; i + kWays * lanes <= end; i += kWays * lanes) {
#pragma GCC unroll 4
    for (int way = 0; way < kWays; ++way) body(way, load_vector(x + i + way * lanes));
  }
  for (; i + lanes <= end; i += lanes) body(0, load_vector(x + i));
  if (i < end) body(0, load_last(x + i, static_cast<int>(end - i)));
}

template <typename T>
typename Accumulate<T>::type maximum(const T* x, int64_t count) {
  using acc = typename Accumulate<T>::type;
  using V = VectorFor<T>;
  const acc lowest = -static_cast<acc>(__builtin_inff());
  V most[kWays];
  for (V& each : most) each = splat(lowest);
  // NaN is passed over; the sum has it.
  for_each_vector(x, 0, count, [&](int way, V value) { most[way] = value > most[way] ? value : most[way]; });
  acc largest = lowest;
  for (const V& each : most) {
    for (int lane = 0; lane < kLanes<acc>; ++lane) largest = each[lane] > largest ? each[lane] : largest;
  }
  return largest;
}

template <typename T>
inline void fetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + i);
}

// Infinity less itself would be NaN.
template <typename acc>
inline acc finite_or_zero(acc value) {
  return __builtin_isfinite(value) ? value : acc(0);
}

// sum over i of exp(x[i] - shift), where shift is the largest, if that is finite, or zero.
template <typename T>
double sum_of_exponentials(const T* x, int64_t count, typename Accumulate<T>::type* shift) {
  using acc = typename Accumulate<T>::type;
  using V = VectorFor<T>;
  double total = 0.0;
  acc largest = maximum(x, smaller(count, kBlock));
  *shift = finite_or_zero(largest);
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = smaller(count, begin + kBlock);
    const acc of_block = maximum(x + begin, end - begin);
    if (of_block > largest) {
      largest = of_block;
      const acc next = finite_or_zero(largest);
      total *= __builtin_exp(static_cast<double>(*shift) - static_cast<double>(next));
      *shift = next;
    }
    const V less = splat(*shift);
    V sum[kWays] = {};
    // The next block comes from memory meanwhile.
    for (int64_t part = begin; part < end; part += kPart) {
      fetch(x + part + kBlock, smaller(kPart, count - part - kBlock));
      for_each_vector(
          x, part, smaller(end, part + kPart), [&](int way, V value) { sum[way] += exponential(value - less); });
    }
    const V all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    for (int lane = 0; lane < kLanes<acc>; ++lane) total += static_cast<double>(all[lane]);
  }
  return total;
}

template <typename T>
double row(void* logits, int64_t count, int64_t label, double scale) {
  using acc = typename Accumulate<T>::type;
  constexpr int lanes = kLanes<acc>;
  T* x = static_cast<T*>(logits);
  if (label < 0) {
    std::memset(x, 0, sizeof(T) * count);
    return 0.0;
  }
  acc shift;
  const double sum = sum_of_exponentials(x, count, &shift);
  const double total = static_cast<double>(shift) + __builtin_log(sum);
  const double at_label = static_cast<double>(load_partial(x + label, 1)[0]);
  if (scale == 0.0) {
    std::memset(x, 0, sizeof(T) * count);
    return total - at_label;
  }
  const acc factor = static_cast<acc>(scale / sum);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    store_vector(x + i, exponential_for<T>(load_vector(x + i) - shift) * factor);
  }
  const int rest = static_cast<int>(count - i);
  if (rest > 0) store_partial(x + i, exponential_for<T>(load_partial(x + i, rest) - shift) * factor, rest);
  store_partial(x + label, splat(static_cast<acc>(scale * __builtin_expm1(at_label - total))), 1);
  return total - at_label;
}

}  // namespace

#define PK_CONCATENATE(a, b) a##b
#define PK_TABLE_NAME(capability) PK_CONCATENATE(cross_entropy_kernels_, capability)

const CrossEntropyKernels PK_TABLE_NAME(PK_CAPABILITY) = {{row<float>, row<bf16>, row<fp16>, row<double>}};

}  // namespace peft_kernels
