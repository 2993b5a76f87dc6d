// ldmatrix and mma.sync in the executor; the fragments are described in csrc/cuda/ptx/matrix.h.
#pragma once

#include <cuda_runtime.h>
#include <ptx/copy_async.h>

namespace peft_kernels {

template <int count>
SIMT_INLINE void load_matrices(uint32_t (&matrices)[count], const void* row, SIMT_HERE) {
  static_assert(count == 2 || count == 4);
  simt::load_matrices(matrices, count, false, row, SIMT_SITE);
}

template <int count>
SIMT_INLINE void load_matrices_transposed(uint32_t (&matrices)[count], const void* row, SIMT_HERE) {
  static_assert(count == 2 || count == 4);
  simt::load_matrices(matrices, count, true, row, SIMT_SITE);
}

SIMT_INLINE void multiply_bf16(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2], SIMT_HERE) {
  simt::multiply(simt::MatrixType::bf16, sums, left, right, SIMT_SITE);
}

SIMT_INLINE void multiply_f16(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2], SIMT_HERE) {
  simt::multiply(simt::MatrixType::f16, sums, left, right, SIMT_SITE);
}

SIMT_INLINE void multiply_tf32(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2], SIMT_HERE) {
  simt::multiply(simt::MatrixType::tf32, sums, left, right, SIMT_SITE);
}

}  // namespace peft_kernels
