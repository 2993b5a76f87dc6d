// The raw-pointer kernels of SM3 for one instruction set; sparse_sm3.cpp composes and threads them.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "sparse_kernels.h"

namespace peft_kernels {

// The numbers of one step of SM3.
struct Sm3Step {
  double decay;  // 1 - lr weight_decay
  double kept;   // beta
  double fresh;  // 1 - beta
  double eps;
  double rate;  // -lr
};

// What all chunks of a call share. `before` are the maxima that the step starts from, in the accumulation dtype; the
// others, in values' dtype, are raised while it goes on.
struct Sm3State {
  const void* indices;
  int64_t columns;  // K
  const void* row_before;
  const void* column_before;
  void* row_max;
  void* column_max;
  void* values;
  const void* grad;
  void* exp_avg;  // or null
};

struct Sm3Kernels {
  // Indexed by the dtype of values: `count` maxima in the accumulation dtype; any count.
  void (*widen[kDTypes])(const void* maxima, int64_t count, void* wide);
  // And by whether indices have 64 bits: entries [begin, end), at most kChunk. Threads may share rows and columns.
  void (*step[kDTypes][2])(const Sm3State& state, int64_t begin, int64_t end, const Sm3Step& step);
};

extern const Sm3Kernels sm3_kernels_baseline;
#if defined(__x86_64__)
extern const Sm3Kernels sm3_kernels_avx2;
extern const Sm3Kernels sm3_kernels_avx512;
#endif

}  // namespace peft_kernels
