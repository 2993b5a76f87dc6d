// Slices of channels for one instruction set. Compiled once per capability with -DPK_CAPABILITY=<name>; see simd.h.
//
// SwiGLU reads two numbers and writes one, backward three and two; an exp of some twenty operations and a division
// take about as long in 16 bits as memory does. Every number is formed in the accumulation dtype and rounded once, in
// the same operations wherever it stands in a row.
#include "s2ft_kernels.h"
#include "chunk.h"
#include "exponential.h"
#include "vectors.h"

#if !defined(PK_CAPABILITY)
#error "compile with -DPK_CAPABILITY=baseline|avx2|avx512"
#endif

namespace peft_kernels {
namespace {

template <typename From, typename To>
void cast(const void* from, void* to, int64_t count) {
  if constexpr (kSame<From, To>) {
    std::memcpy(to, from, sizeof(To) * count);
  } else {
    for (int64_t i = 0; i < count; i += kChunk) {  // as many as convert() takes
      convert(static_cast<const From*>(from) + i, static_cast<To*>(to) + i, smaller(kChunk, count - i));
    }
  }
}

// 1 / (1 + exp(-gate)) in the accumulation type.
template <typename T>
inline VectorFor<T> sigmoid(VectorFor<T> gate) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    // For results of 16 bits: fewer terms, and a reciprocal of 14 bits with a step of Newton's instead of a division.
    const __m512 sum = _mm512_add_ps((__m512)exponential<kShortTerms>(-gate), _mm512_set1_ps(1.0f));
    const __m512 near = _mm512_rcp14_ps(sum);
    const __m512 error = _mm512_fnmadd_ps(sum, near, _mm512_set1_ps(1.0f));
    const __mmask16 finite = _mm512_cmp_ps_mask(sum, _mm512_set1_ps(__builtin_inff()), _CMP_NEQ_UQ);
    return (VectorFor<T>)_mm512_mask_fmadd_ps(near, finite, error, near);
  }
#endif
  return 1 / (exponential(-gate) + 1);
}

template <typename T>
void swiglu(const void* gate, const void* up, void* h, int64_t count) {
  using V = VectorFor<T>;
  const T *gates = static_cast<const T*>(gate), *ups = static_cast<const T*>(up);
  T* to = static_cast<T*>(h);
  for_each_vector<T>(count, [=](int64_t i, auto load, auto store) {
    const V g = load(gates + i);
    store(to + i, g * sigmoid<T>(g) * load(ups + i));
  });
}

// With s = sigmoid(gate): dup = dh gate s, dgate = dh up s (1 + gate (1 - s)).
template <typename T>
void swiglu_backward(
    const void* grad_h, const void* gate, const void* up, void* grad_gate, void* grad_up, int64_t count) {
  using V = VectorFor<T>;
  const T *grads = static_cast<const T*>(grad_h), *gates = static_cast<const T*>(gate),
          *ups = static_cast<const T*>(up);
  T *to_gate = static_cast<T*>(grad_gate), *to_up = static_cast<T*>(grad_up);
  for_each_vector<T>(count, [=](int64_t i, auto load, auto store) {
    const V g = load(gates + i), dh = load(grads + i);
    const V s = sigmoid<T>(g);
    store(to_up + i, dh * (g * s));
    store(to_gate + i, dh * load(ups + i) * (s * (g * (1 - s) + 1)));
  });
}

}  // namespace

#define PK_CONCATENATE(a, b) a##b
#define PK_TABLE_NAME(capability) PK_CONCATENATE(s2ft_kernels_, capability)

#define PK_TO_EACH(From) {cast<From, float>, cast<From, bf16>, cast<From, fp16>, cast<From, double>}

const SliceKernels PK_TABLE_NAME(PK_CAPABILITY) = {
    {PK_TO_EACH(float), PK_TO_EACH(bf16), PK_TO_EACH(fp16), PK_TO_EACH(double)},
    {swiglu<float>, swiglu<bf16>, swiglu<fp16>, swiglu<double>},
    {swiglu_backward<float>, swiglu_backward<bf16>, swiglu_backward<fp16>, swiglu_backward<double>},
};

}  // namespace peft_kernels
