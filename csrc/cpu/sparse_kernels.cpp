// Sparse deltas for one instruction set. Compiled once per capability with -DPK_CAPABILITY=<name>; see simd.h.
//
// The weight is read and written a line at a time for an element or two, so memory bounds all of this: a line costs
// 64 bytes each way, an entry 4 or 8 bytes of index and the element. Positions are known long before they are needed,
// so lines are asked for ahead. AdamW reads four numbers and writes three for each entry, in order; a square
// root and a division take as long as that, so the other division of the definition is a multiplication here.
//
// Sums are formed in the wider of values' dtype and the accumulation dtype, one rounding per operation and no fused
// multiply-add: the bits are the same with every instruction set, and those of the sums are the definition's.
#include "sparse_kernels.h"
#include "chunk.h"

#if !defined(PK_CAPABILITY)
#error "compile with -DPK_CAPABILITY=baseline|avx2|avx512"
#endif

namespace peft_kernels {
namespace {

// Entries between a line's prefetch and its use: enough to cover the latency of memory, and what an optimizer
// calculates between two writes.
constexpr int64_t kAhead = 128;

// The type that sums of two dtypes are formed in.
template <typename A, typename B>
struct Wider {
  using type = float;
};
template <typename A>
struct Wider<A, double> {
  using type = double;
};
template <typename B>
struct Wider<double, B> {
  using type = double;
};
template <>
struct Wider<double, double> {
  using type = double;
};

template <typename Weight, typename Value>
void add(const void* base, const void* values, double scaling, int64_t count, void* sums) {
  using Sum = typename Wider<Weight, Value>::type;
  const Sum factor = static_cast<Sum>(scaling);
  Sum sum[kChunk], change[kChunk];
  convert(static_cast<const Weight*>(base), sum, count);
  convert(static_cast<const Value*>(values), change, count);
  for (int64_t i = 0; i < count; ++i) sum[i] += factor * change[i];
  convert(sum, static_cast<Weight*>(sums), count);
}

template <typename acc>
void adamw_in(
    acc* __restrict values, const acc* __restrict grad, acc* __restrict exp_avg, acc* __restrict exp_avg_sq,
    int64_t count, const AdamWStep& step) {
  const acc decay = static_cast<acc>(step.decay), first_weight = static_cast<acc>(step.first_weight);
  const acc second_kept = static_cast<acc>(step.second_kept), second_weight = static_cast<acc>(step.second_weight);
  const acc correction = static_cast<acc>(step.correction), eps = static_cast<acc>(step.eps);
  const acc rate = static_cast<acc>(step.rate);
  // As torch interpolates: from the nearer end, so that a weight of 1 gives the gradient itself.
  const bool from_average = first_weight < acc(0.5);
  const acc slope = from_average ? first_weight : first_weight - acc(1);
  for (int64_t i = 0; i < count; ++i) {
    const acc g = grad[i], average = exp_avg[i];
    const acc first = (from_average ? average : g) + slope * (g - average);
    const acc second = exp_avg_sq[i] * second_kept + second_weight * g * g;
    const acc denominator = square_root(second) * correction + eps;
    exp_avg[i] = first;
    exp_avg_sq[i] = second;
    values[i] = values[i] * decay + rate * first / denominator;
  }
}

template <typename T>
void adamw(void* values, const void* grad, void* exp_avg, void* exp_avg_sq, int64_t count, const AdamWStep& step) {
  using acc = typename Accumulate<T>::type;
  T *p = static_cast<T*>(values), *m = static_cast<T*>(exp_avg), *v = static_cast<T*>(exp_avg_sq);
  const T* g = static_cast<const T*>(grad);
  if constexpr (kSame<T, acc>) {
    adamw_in(p, g, m, v, count, step);
  } else {
    acc wide_p[kChunk], wide_g[kChunk], wide_m[kChunk], wide_v[kChunk];
    for (int64_t first = 0; first < count; first += kChunk) {
      const int64_t some = smaller(kChunk, count - first);
      convert(p + first, wide_p, some);
      convert(g + first, wide_g, some);
      convert(m + first, wide_m, some);
      convert(v + first, wide_v, some);
      adamw_in(wide_p, wide_g, wide_m, wide_v, some, step);
      convert(wide_p, p + first, some);
      convert(wide_m, m + first, some);
      convert(wide_v, v + first, some);
    }
  }
}

// body(i, position) for entries [begin, end), in order; lines are asked for kAhead entries ahead, past `end` too.
template <typename Bits, typename Index, typename F>
inline void walk(const Entries& entries, int64_t begin, int64_t end, const F& body) {
  const Index* indices = static_cast<const Index*>(entries.indices);
  const Bits* weight = static_cast<const Bits*>(entries.weight);
  const int64_t last = smaller(end, entries.count - kAhead);
  int64_t i = begin;
  for (; i < last; ++i) {
    __builtin_prefetch(weight + indices[i + kAhead], 1);
    body(i, indices[i]);
  }
  for (; i < end; ++i) body(i, indices[i]);
}

template <typename Bits, typename Index>
void gather(const Entries& entries, int64_t begin, int64_t end, void* elements) {
  const Bits* weight = static_cast<const Bits*>(entries.weight);
  Bits* to = static_cast<Bits*>(elements) - begin;
  walk<Bits, Index>(entries, begin, end, [&](int64_t i, int64_t position) { to[i] = weight[position]; });
}

template <typename Bits, typename Index>
void scatter(const Entries& entries, int64_t begin, int64_t end, const void* elements) {
  Bits* weight = static_cast<Bits*>(entries.weight);
  const Bits* from = static_cast<const Bits*>(elements) - begin;
  walk<Bits, Index>(entries, begin, end, [&](int64_t i, int64_t position) { weight[position] = from[i]; });
}

}  // namespace

#define PK_CONCATENATE(a, b) a##b
#define PK_TABLE_NAME(capability) PK_CONCATENATE(sparse_kernels_, capability)

#define PK_FOR_VALUES(Weight) {add<Weight, float>, add<Weight, bf16>, add<Weight, fp16>, add<Weight, double>}
#define PK_FOR_INDICES(kernel, Bits) {kernel<Bits, int32_t>, kernel<Bits, int64_t>}
#define PK_FOR_SIZES(kernel) \
  {PK_FOR_INDICES(kernel, uint16_t), PK_FOR_INDICES(kernel, uint32_t), PK_FOR_INDICES(kernel, uint64_t)}

const SparseKernels PK_TABLE_NAME(PK_CAPABILITY) = {
    {PK_FOR_VALUES(float), PK_FOR_VALUES(bf16), PK_FOR_VALUES(fp16), PK_FOR_VALUES(double)},
    {adamw<float>, adamw<bf16>, adamw<fp16>, adamw<double>},
    PK_FOR_SIZES(gather),
    PK_FOR_SIZES(scatter),
};

}  // namespace peft_kernels
