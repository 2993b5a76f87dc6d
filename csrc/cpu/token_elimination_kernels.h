// The raw-pointer kernels of kept rows for one instruction set; token_elimination.cpp and token_linear.cpp compose and
// thread them. A row is contiguous, `count` elements of it are any number; `acc` is float, or double for double.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace peft_kernels {

// One row of the backward pass of RMSNorm.
struct NormGradient {
  const void* grad_h;
  const void* kept;
  const void* rstd;      // one acc
  const void* scale;     // offset + weight in acc
  const void* residual;  // what dkept is added to, or null
  void* dx;
  void* dweight;  // acc, added to; or null
  int64_t count;
};

// Each indexed by the dtype of the rows.
struct TokenKernels {
  // to = residual + values; to may be residual.
  void (*add[kDTypes])(const void* residual, const void* values, void* to, int64_t count);

  // *rstd = 1 / sqrt(mean(row^2) + eps); h = row rstd scale, with rstd one acc and scale a row of them.
  void (*rms[kDTypes])(const void* row, int64_t count, double eps, void* rstd);
  void (*normalize[kDTypes])(const void* row, const void* rstd, const void* scale, void* h, int64_t count);
  void (*normalize_backward[kDTypes])(const NormGradient& row);

  // Elements c below half and c + half of one head turned by angles in acc; back when inverse.
  void (*rotate[kDTypes])(const void* head, const void* cos, const void* sin, void* to, int64_t half, bool inverse);
};

// The kernels of the best instruction set.
const TokenKernels& token_kernels();

extern const TokenKernels token_elimination_kernels_baseline;
#if defined(__x86_64__)
extern const TokenKernels token_elimination_kernels_avx2;
extern const TokenKernels token_elimination_kernels_avx512;
#endif

}  // namespace peft_kernels
