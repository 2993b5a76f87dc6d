// ldmatrix (sm_75) and mma.sync (sm_80): whole warps load 8 x 8 matrices from shared memory and multiply fragments.
//
// With group = lane / 4 and t = lane % 4, a lane holds of the product sums [16 x 8] += left [16 x k] right [k x 8]
//
//     sums   (group, 2t) (group, 2t + 1) (group + 8, 2t) (group + 8, 2t + 1)
//     left   16 bits, k = 16: pairs from (group, 2t) (group + 8, 2t) (group, 2t + 8) (group + 8, 2t + 8)
//            tf32, k = 8:     (group, t) (group + 8, t) (group, t + 4) (group + 8, t + 4)
//     right  16 bits: pairs from (2t, group) (2t + 8, group);  tf32: (t, group) (t + 4, group)
//
// "PTX ISA", matrix fragments of mma.m16n8k16 and mma.m16n8k8.
#pragma once

#include <cstdint>

#include <ptx/copy_async.h>

namespace peft_kernels {

// Lane l gives the address of row l % 8, 16 bytes, of matrix l / 8. A lane receives the 4 bytes at row group, word t of
// each matrix; transposed, the 16-bit elements (2t, group) and (2t + 1, group).
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void multiply_bf16(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

__device__ __forceinline__ void multiply_f16(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

// Reads the upper 19 bits of each float.
__device__ __forceinline__ void multiply_tf32(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

}  // namespace peft_kernels
