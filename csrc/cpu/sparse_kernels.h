// The raw-pointer kernels of sparse deltas for one instruction set; sparse_delta.cpp composes and threads them.
//
// Entries go through in chunks of at most kChunk: what one step writes, the next one finds in the first-level cache.
// So arithmetic, which knows dtypes, and the walk over the weight, which knows only the size of an element, stay apart.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace peft_kernels {

constexpr int64_t kChunk = 512;

// Elements of a weight at sorted positions.
struct Entries {
  void* weight;
  const void* indices;
  int64_t count;
};

// The numbers of one step of AdamW.
struct AdamWStep {
  double decay;          // 1 - lr weight_decay
  double first_weight;   // 1 - beta1
  double second_kept;    // beta2
  double second_weight;  // 1 - beta2
  double correction;     // 1 / sqrt(1 - beta2^step)
  double eps;
  double rate;  // -lr / (1 - beta1^step)
};

struct SparseKernels {
  // sums[i] = base[i] + scaling values[i] for i < count <= kChunk; base and sums, which may be one, in the weight's
  // dtype. Indexed by that dtype and values'.
  using Add = void (*)(const void* base, const void* values, double scaling, int64_t count, void* sums);
  Add add[kDTypes][kDTypes];
  // AdamW on `count` values; any count.
  void (*adamw[kDTypes])(
      void* values, const void* grad, void* exp_avg, void* exp_avg_sq, int64_t count, const AdamWStep& step);
  // Indexed by size_index() of the element and by whether indices have 64 bits. For entries [begin, end):
  // elements[i - begin] = weight[indices[i]], and back.
  void (*gather[3][2])(const Entries& entries, int64_t begin, int64_t end, void* elements);
  void (*scatter[3][2])(const Entries& entries, int64_t begin, int64_t end, const void* elements);
};

constexpr int size_index(DType dtype) { return dtype == DType::f64 ? 2 : dtype == DType::f32 ? 1 : 0; }

extern const SparseKernels sparse_kernels_baseline;
#if defined(__x86_64__)
extern const SparseKernels sparse_kernels_avx2;
extern const SparseKernels sparse_kernels_avx512;
#endif

}  // namespace peft_kernels
