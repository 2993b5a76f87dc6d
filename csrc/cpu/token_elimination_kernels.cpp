// Rows of kept tokens for one instruction set. Compiled once per capability with -DPK_CAPABILITY=<name>; see simd.h.
//
// All of these are bound by memory: a row is read once and stays in the first-level cache for whatever comes after its
// sum. Every number is formed in the accumulation type and rounded once.
#include "token_elimination_kernels.h"
#include "chunk.h"
#include "vectors.h"

#if !defined(PK_CAPABILITY)
#error "compile with -DPK_CAPABILITY=baseline|avx2|avx512"
#endif

namespace peft_kernels {
namespace {

template <typename T>
using Acc = typename Accumulate<T>::type;

// The sum over a row of body(i, load), a vector of acc. Four sums at a time, as one would wait for its own additions;
// their order follows from `count` alone.
template <typename T, typename F>
inline Acc<T> sum_over(int64_t count, const F& body) {
  constexpr int lanes = kLanes<Acc<T>>;
  const auto whole = [](const auto* from) { return load_vector(from); };
  VectorFor<T> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] += body(i + j * lanes, whole);
  }
  for (; i + lanes <= count; i += lanes) sums[0] += body(i, whole);
  const int rest = static_cast<int>(count - i);
  if (rest > 0) sums[1] += body(i, [=](const auto* from) { return load_partial(from, rest); });
  const VectorFor<T> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  Acc<T> total = 0;
  for (int lane = 0; lane < lanes; ++lane) total += sum[lane];
  return total;
}

template <typename T>
void add(const void* residual, const void* values, void* to, int64_t count) {
  const T *left = static_cast<const T*>(residual), *right = static_cast<const T*>(values);
  T* sums = static_cast<T*>(to);
  for_each_vector<T>(
      count, [=](int64_t i, auto load, auto store) { store(sums + i, load(left + i) + load(right + i)); });
}

template <typename T>
void rms(const void* row, int64_t count, double eps, void* rstd) {
  const T* from = static_cast<const T*>(row);
  const Acc<T> squares = sum_over<T>(count, [=](int64_t i, auto load) {
    const VectorFor<T> value = load(from + i);
    return value * value;
  });
  *static_cast<Acc<T>*>(rstd) = 1 / square_root(squares / static_cast<Acc<T>>(count) + static_cast<Acc<T>>(eps));
}

// Vectors of acc beside those of T: whole, or the first `rest` lanes, as T's are.
template <typename T, typename F>
inline void for_each_scaled(int64_t count, const F& body) {
  constexpr int lanes = kLanes<Acc<T>>;
  const int64_t whole = count / lanes * lanes;
  for_each_vector<T>(count, [&](int64_t i, auto load, auto store) {
    const int rest = static_cast<int>(count - whole);
    body(
        i, load, store, [=](const Acc<T>* from) { return i < whole ? load_vector(from) : load_partial(from, rest); },
        [=](Acc<T>* to, VectorFor<T> value) { i < whole ? store_vector(to, value) : store_partial(to, value, rest); });
  });
}

// Two multiplications in this order, which nothing contracts: the bits are those of any other call on this row.
template <typename T>
void normalize(const void* row, const void* rstd, const void* scale, void* h, int64_t count) {
  const T* from = static_cast<const T*>(row);
  const Acc<T>* scales = static_cast<const Acc<T>*>(scale);
  const VectorFor<T> r = splat(*static_cast<const Acc<T>*>(rstd));
  T* to = static_cast<T*>(h);
  for_each_scaled<T>(count, [=](int64_t i, auto load, auto store, auto load_acc, auto) {
    store(to + i, load(from + i) * r * load_acc(scales + i));
  });
}

// With g = grad_h scale and n = kept rstd: dx = residual + rstd (g - n mean(g n)), dweight += grad_h n.
template <typename T>
void normalize_backward(const NormGradient& row) {
  using V = VectorFor<T>;
  const T *grads = static_cast<const T*>(row.grad_h), *kept = static_cast<const T*>(row.kept),
          *residual = static_cast<const T*>(row.residual);
  const Acc<T>* scales = static_cast<const Acc<T>*>(row.scale);
  Acc<T>* dweight = static_cast<Acc<T>*>(row.dweight);
  T* to = static_cast<T*>(row.dx);
  const Acc<T> rstd = *static_cast<const Acc<T>*>(row.rstd);
  const V r = splat(rstd);
  const Acc<T> product =
      sum_over<T>(row.count, [=](int64_t i, auto load) { return load(grads + i) * load(scales + i) * load(kept + i); });
  const V mean = splat(product * rstd / static_cast<Acc<T>>(row.count));
  for_each_scaled<T>(row.count, [=](int64_t i, auto load, auto store, auto load_acc, auto store_acc) {
    const V dh = load(grads + i), n = load(kept + i) * r;
    const V dkept = r * (dh * load_acc(scales + i) - n * mean);
    store(to + i, residual == nullptr ? dkept : load(residual + i) + dkept);
    if (dweight != nullptr) store_acc(dweight + i, load_acc(dweight + i) + dh * n);
  });
}

template <typename T>
void rotate(const void* head, const void* cos, const void* sin, void* to, int64_t half, bool inverse) {
  using V = VectorFor<T>;
  const T* from = static_cast<const T*>(head);
  const Acc<T>*cosines = static_cast<const Acc<T>*>(cos), *sines = static_cast<const Acc<T>*>(sin);
  T* rotated = static_cast<T*>(to);
  for_each_scaled<T>(half, [=](int64_t i, auto load, auto store, auto load_acc, auto) {
    const V first = load(from + i), second = load(from + half + i);
    const V cos_first = load_acc(cosines + i), cos_second = load_acc(cosines + half + i);
    const V sin_first = load_acc(sines + i), sin_second = load_acc(sines + half + i);
    // Turned back, each sine stands at the channel that it came from.
    store(rotated + i, inverse ? first * cos_first + second * sin_second : first * cos_first - second * sin_first);
    store(
        rotated + half + i,
        inverse ? second * cos_second - first * sin_first : second * cos_second + first * sin_second);
  });
}

}  // namespace

#define PK_CONCATENATE(a, b) a##b
#define PK_TABLE_NAME(capability) PK_CONCATENATE(token_elimination_kernels_, capability)
#define PK_EACH(kernel) {kernel<float>, kernel<bf16>, kernel<fp16>, kernel<double>}

const TokenKernels PK_TABLE_NAME(PK_CAPABILITY) = {
    PK_EACH(add), PK_EACH(rms), PK_EACH(normalize), PK_EACH(normalize_backward), PK_EACH(rotate),
};

}  // namespace peft_kernels
