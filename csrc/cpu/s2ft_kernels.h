// The raw-pointer kernels of slices of channels for one instruction set; s2ft.cpp and slice_grad.cpp compose and thread
// them. Rows are contiguous, `count` is any.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace peft_kernels {

struct SliceKernels {
  // to[i] = from[i] in another dtype, indexed by those of `from` and `to`; bits where they are one.
  using Cast = void (*)(const void* from, void* to, int64_t count);
  Cast cast[kDTypes][kDTypes];

  // h = silu(gate) up, and from grad_h the gradients of gate and up. Indexed by dtype.
  void (*swiglu[kDTypes])(const void* gate, const void* up, void* h, int64_t count);
  void (*swiglu_backward[kDTypes])(
      const void* grad_h, const void* gate, const void* up, void* grad_gate, void* grad_up, int64_t count);
};

// The kernels of the best instruction set.
const SliceKernels& slice_kernels();

extern const SliceKernels s2ft_kernels_baseline;
#if defined(__x86_64__)
extern const SliceKernels s2ft_kernels_avx2;
extern const SliceKernels s2ft_kernels_avx512;
#endif

}  // namespace peft_kernels
