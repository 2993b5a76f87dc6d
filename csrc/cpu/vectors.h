// Walks over a row, a vector at a time; included once per capability, as simd.h is.
#pragma once

#include "simd.h"

namespace peft_kernels {
namespace {

// body(i, load, store) for each vector of a row, the last one partial.
template <typename T, typename F>
inline void for_each_vector(int64_t count, const F& body) {
  constexpr int lanes = kLanes<typename Accumulate<T>::type>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    body(
        i, [](const T* from) { return load_vector(from); }, [](T* to, VectorFor<T> value) { store_vector(to, value); });
  }
  const int rest = static_cast<int>(count - i);
  if (rest == 0) return;
  body(
      i, [=](const T* from) { return load_partial(from, rest); },
      [=](T* to, VectorFor<T> value) { store_partial(to, value, rest); });
}

}  // namespace
}  // namespace peft_kernels
