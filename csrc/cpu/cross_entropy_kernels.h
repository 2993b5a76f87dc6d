// The raw-pointer kernels of the cross entropy for one instruction set; cross_entropy.cpp threads them.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace peft_kernels {

struct CrossEntropyKernels {
  // The loss of a row of `count` logits, which become scale (softmax - onehot(label)); zeros where the label is
  // negative or the scale zero. Indexed by dtype.
  double (*row[kDTypes])(void* logits, int64_t count, int64_t label, double scale);
};

extern const CrossEntropyKernels cross_entropy_kernels_baseline;
#if defined(__x86_64__)
extern const CrossEntropyKernels cross_entropy_kernels_avx2;
extern const CrossEntropyKernels cross_entropy_kernels_avx512;
#endif

}  // namespace peft_kernels
