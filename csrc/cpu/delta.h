// The entries of a weight that a delta changes, and the chunks that its operators go through in threads.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>

#include "capability.h"
#include "lora_products.h"
#include "parallel.h"
#include "sparse_kernels.h"

namespace peft_kernels {

inline const SparseKernels& choose_sparse_kernels() {
#if defined(__x86_64__)
  const Capability capability = allowed_capability();
  if (capability >= Capability::avx512) return sparse_kernels_avx512;
  if (capability == Capability::avx2) return sparse_kernels_avx2;
#endif
  return sparse_kernels_baseline;
}

inline const SparseKernels& sparse_kernels() {
  static const SparseKernels& table = choose_sparse_kernels();
  return table;
}

inline AdamWStep adamw_step(int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay) {
  const double steps = static_cast<double>(step);
  return {
      .decay = 1.0 - lr * weight_decay,
      .first_weight = 1.0 - beta1,
      .second_kept = beta2,
      .second_weight = 1.0 - beta2,
      .correction = 1.0 / std::sqrt(1.0 - std::pow(beta2, steps)),
      .eps = eps,
      .rate = -lr / (1.0 - std::pow(beta1, steps)),
  };
}

// Element `at` of a contiguous tensor's memory.
inline char* at(void* data, int64_t element_bytes, int64_t index) {
  return static_cast<char*>(data) + element_bytes * index;
}
inline const char* at(const void* data, int64_t element_bytes, int64_t index) {
  return static_cast<const char*>(data) + element_bytes * index;
}

// body(begin, end) over chunks of at most kChunk entries, in threads.
template <typename F>
void parallel_chunks(int64_t count, const F& body) {
  constexpr int64_t kWorkPerEntry = 16;
  parallel_units(count, kChunk, kWorkPerEntry, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kChunk) body(first, std::min(end, first + kChunk));
  });
}

// The entries of a weight that a delta changes: checked, and with the kernels for their dtypes.
class Delta {
 public:
  Delta(const Tensor& weight, const Tensor& indices)
      : entries_{weight.data_ptr(), indices.const_data_ptr(), indices.numel()},
        dtype_(dtype_of(weight.scalar_type())),
        bytes_(weight.element_size()),
        wide_(indices.scalar_type() == ScalarType::Long),
        kernels_(sparse_kernels()) {}

  // weight[indices] = elements, for entries [begin, end).
  void write(int64_t begin, int64_t end, const void* elements) const {
    kernels_.scatter[size_index(dtype_)][wide_](entries_, begin, end, elements);
  }

  // weight[indices] = original + values, for a chunk; both pointers at the chunk's first entry.
  void write_sum(int64_t begin, int64_t end, const void* original, const void* values, DType values_dtype) const {
    alignas(64) char sums[kChunk * sizeof(double)];
    add(values_dtype)(original, values, 1.0, end - begin, sums);
    write(begin, end, sums);
  }

  // weight[indices] += scaling values, for a chunk.
  void accumulate(int64_t begin, int64_t end, const void* values, DType values_dtype, double scaling) const {
    alignas(64) char sums[kChunk * sizeof(double)];
    kernels_.gather[size_index(dtype_)][wide_](entries_, begin, end, sums);
    add(values_dtype)(sums, values, scaling, end - begin, sums);
    write(begin, end, sums);
  }

  int64_t bytes() const { return bytes_; }

 private:
  SparseKernels::Add add(DType values_dtype) const {
    return kernels_.add[static_cast<int>(dtype_)][static_cast<int>(values_dtype)];
  }

  Entries entries_;
  DType dtype_;
  int64_t bytes_;
  bool wide_;
  const SparseKernels& kernels_;
};

}  // namespace peft_kernels
