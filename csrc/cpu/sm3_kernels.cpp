// SM3 for one instruction set. Compiled once per capability with -DPK_CAPABILITY=<name>; see simd.h.
//
// An entry reads its gradient, its value and one maximum of each kind, and writes the value; the maxima of a layer stay
// in the first two caches. Two walks over the entries, which are scalar, and one square root and division bound it.
//
// The new maxima are formed by atomic maxima of bits: for numbers from 0 on they are ordered as the numbers are, with
// NaN above all. A maximum does not depend on the order, and all second moments come from the old maxima, so neither do
// the results. No fused multiply-add: the bits are the same with every instruction set.
#include "sm3_kernels.h"
#include "chunk.h"

#if !defined(PK_CAPABILITY)
#error "compile with -DPK_CAPABILITY=baseline|avx2|avx512"
#endif

namespace peft_kernels {
namespace {

template <int bytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  using type = uint16_t;
};
template <>
struct BitsOf<4> {
  using type = uint32_t;
};
template <>
struct BitsOf<8> {
  using type = uint64_t;
};

// Without the sign, which a zero may have.
template <typename Bits>
inline Bits magnitude(Bits bits) {
  constexpr Bits all = static_cast<Bits>(-1);  // of 16 bits, where ~0 would be an int
  return static_cast<Bits>(bits & (all >> 1));
}

template <typename Bits>
inline void raise(Bits* maximum, Bits to) {
  Bits now = __atomic_load_n(maximum, __ATOMIC_RELAXED);
  // Asking first leaves the line shared between the threads: few entries raise anything.
  while (magnitude(now) < to) {
    if (__atomic_compare_exchange_n(maximum, &now, to, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return;
  }
}

// The entries of a chunk that lie in one row: from `first` to the `first` of the next run.
struct Run {
  int64_t row;
  int64_t first;
};

// Cuts entries [begin, end) into runs, with one more behind the last. Returns how many there are.
template <typename Index>
inline int64_t cut_into_runs(const Index* indices, int64_t begin, int64_t end, int64_t columns, Run* runs) {
  int64_t count = 0, limit = 0, row = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t position = static_cast<int64_t>(indices[i]);
    if (position < limit) continue;
    // The next row most times, which spares a division.
    row = count > 0 && position < limit + columns ? row + 1 : position / columns;
    limit = (row + 1) * columns;
    runs[count++] = {row, i};
  }
  runs[count] = {0, end};
  return count;
}

// second = cover + g^2, step = g / (sqrt(second) + eps), and what becomes of the rest. `second` holds the covers first.
template <typename acc>
void step_in(
    acc* __restrict values, const acc* __restrict grad, acc* __restrict exp_avg, acc* __restrict second, int64_t count,
    const Sm3Step& numbers) {
  const acc decay = static_cast<acc>(numbers.decay), eps = static_cast<acc>(numbers.eps);
  const acc kept = static_cast<acc>(numbers.kept), fresh = static_cast<acc>(numbers.fresh);
  const acc rate = static_cast<acc>(numbers.rate);
  const auto steps = [&](int64_t i) {
    const acc g = grad[i], u = second[i] + g * g;
    second[i] = u;
    const acc step = g / (square_root(u) + eps);
    return u == acc(0) ? acc(0) : step;  // no gradient ever: 0 / 0 without eps
  };
  if (exp_avg == nullptr) {
    for (int64_t i = 0; i < count; ++i) values[i] = values[i] * decay + rate * steps(i);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const acc average = kept * exp_avg[i] + fresh * steps(i);
      exp_avg[i] = average;
      values[i] = values[i] * decay + rate * average;
    }
  }
}

template <typename T, typename Index>
void step(const Sm3State& state, int64_t begin, int64_t end, const Sm3Step& numbers) {
  using acc = typename Accumulate<T>::type;
  using Bits = typename BitsOf<sizeof(T)>::type;
  const Index* indices = static_cast<const Index*>(state.indices);
  const acc* row_before = static_cast<const acc*>(state.row_before);
  const acc* column_before = static_cast<const acc*>(state.column_before);
  const int64_t count = end - begin;
  acc second[kChunk];
  Run runs[kChunk + 1];
  const int64_t run_count = cut_into_runs(indices, begin, end, state.columns, runs);
  for (int64_t r = 0; r < run_count; ++r) {
    const int64_t base = runs[r].row * state.columns;
    const acc of_row = row_before[runs[r].row];
    for (int64_t i = runs[r].first; i < runs[r + 1].first; ++i) {
      const acc of_column = column_before[indices[i] - base];
      second[i - begin] = of_row < of_column || of_row != of_row ? of_row : of_column;  // NaN of either stays
    }
  }
  T* p = static_cast<T*>(state.values) + begin;
  const T* g = static_cast<const T*>(state.grad) + begin;
  T* m = state.exp_avg == nullptr ? nullptr : static_cast<T*>(state.exp_avg) + begin;
  T rounded[kChunk];
  if constexpr (kSame<T, acc>) {
    step_in(p, g, m, second, count, numbers);
    std::memcpy(rounded, second, sizeof(T) * count);
  } else {
    acc wide_p[kChunk], wide_g[kChunk], wide_m[kChunk];
    convert(p, wide_p, count);
    convert(g, wide_g, count);
    if (m != nullptr) convert(m, wide_m, count);
    step_in(wide_p, wide_g, m == nullptr ? nullptr : wide_m, second, count, numbers);
    convert(wide_p, p, count);
    if (m != nullptr) convert(wide_m, m, count);
    convert(second, rounded, count);
  }
  Bits bits[kChunk];
  std::memcpy(bits, rounded, sizeof(T) * count);
  for (int64_t i = 0; i < count; ++i) bits[i] = magnitude(bits[i]);
  Bits* column_max = static_cast<Bits*>(state.column_max);
  for (int64_t r = 0; r < run_count; ++r) {
    const int64_t base = runs[r].row * state.columns;
    Bits most = 0;
    for (int64_t i = runs[r].first; i < runs[r + 1].first; ++i) {
      most = bits[i - begin] > most ? bits[i - begin] : most;
      raise(column_max + (indices[i] - base), bits[i - begin]);
    }
    raise(static_cast<Bits*>(state.row_max) + runs[r].row, most);
  }
}

template <typename T>
void widen(const void* maxima, int64_t count, void* wide) {
  using acc = typename Accumulate<T>::type;
  convert(static_cast<const T*>(maxima), static_cast<acc*>(wide), count);
}

}  // namespace

#define PK_CONCATENATE(a, b) a##b
#define PK_TABLE_NAME(capability) PK_CONCATENATE(sm3_kernels_, capability)

#define PK_FOR_INDICES(T) {step<T, int32_t>, step<T, int64_t>}

const Sm3Kernels PK_TABLE_NAME(PK_CAPABILITY) = {
    {widen<float>, widen<bf16>, widen<fp16>, widen<double>},
    {PK_FOR_INDICES(float), PK_FOR_INDICES(bf16), PK_FOR_INDICES(fp16), PK_FOR_INDICES(double)},
};

}  // namespace peft_kernels
