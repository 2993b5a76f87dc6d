// Kernels with a bug in how their threads are ordered; `variant` 1 has it. The comments mark where it must be reported:
// of the two accesses of a race, the later one in the order that the seed chose.
#include "case.h"

CASE(missing_barrier, 1, 64, 0) {
  __shared__ float tile[64];
  const int thread = static_cast<int>(threadIdx.x);
  tile[thread] = 0.0f;
  __syncthreads();
  tile[thread] = a.in<float>()[thread];  // BUG: missing_barrier
  if (!a.variant) __syncthreads();
  a.out<float>()[thread] = tile[63 - thread];  // BUG: missing_barrier
}

// The barrier at the end of a loop is missing: the next round overwrites what others still read.
CASE(missing_second_barrier, 1, 64, 0) {
  __shared__ float tile[64];
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  for (int round = 0; round < 3; ++round) {
    tile[thread] = static_cast<float>(round);  // BUG: missing_second_barrier
    __syncthreads();
    sum += tile[63 - thread];  // BUG: missing_second_barrier
    if (!a.variant) __syncthreads();
  }
  a.out<float>()[thread] = sum;
}

CASE(missing_syncwarp, 1, 32, 0) {
  __shared__ float tile[32];
  const int lane = static_cast<int>(threadIdx.x);
  tile[lane] = 0.0f;
  __syncwarp();
  tile[lane] = a.in<float>()[lane];  // BUG: missing_syncwarp
  if (!a.variant) __syncwarp();
  a.out<float>()[lane] = tile[31 - lane];  // BUG: missing_syncwarp
}

// __syncwarp orders a warp, not two.
CASE(syncwarp_instead_of_barrier, 1, 64, 0) {
  __shared__ float tile[64];
  const int thread = static_cast<int>(threadIdx.x);
  tile[thread] = 0.0f;
  __syncthreads();
  tile[thread] = a.in<float>()[thread];  // BUG: syncwarp_instead_of_barrier
  if (a.variant) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  a.out<float>()[thread] = tile[63 - thread];  // BUG: syncwarp_instead_of_barrier
}

// A shuffle makes lanes meet and orders nothing in memory.
CASE(shuffle_instead_of_syncwarp, 1, 32, 0) {
  __shared__ float tile[32];
  const int lane = static_cast<int>(threadIdx.x);
  tile[lane] = 0.0f;
  __syncwarp();
  tile[lane] = a.in<float>()[lane];
  const float own = __shfl_sync(~0u, 1.0f, 0);
  if (!a.variant) __syncwarp();
  a.out<float>()[lane] = own * tile[31 - lane];  // BUG: shuffle_instead_of_syncwarp
}

CASE(write_after_read, 1, 32, 0) {
  __shared__ float tile[32];
  const int lane = static_cast<int>(threadIdx.x);
  tile[lane] = a.in<float>()[lane];
  __syncwarp();
  const float other = __shfl_sync(~0u, tile[31 - lane], lane);
  if (!a.variant) __syncwarp();
  tile[lane] = other;  // BUG: write_after_read
  a.out<float>()[lane] = tile[lane];
}

// A flag says that the other warp has read; without a fence, which the executor does not know, that is no order either.
CASE(order_by_a_flag, 1, 64, 0) {
  __shared__ float value;
  __shared__ int read;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) value = 1.0f, read = 0;
  __syncthreads();
  if (thread == 40) {
    a.out<float>()[0] = value;
    atomicAdd(&read, 1);
  }
  if (!a.variant) __syncthreads();
  if (thread == 0) {
    while (atomicAdd(&read, 0) == 0) {
    }
    value = 2.0f;  // BUG: order_by_a_flag
  }
}

CASE(two_blocks_one_element, 2, 32, 0) {
  const int64_t i = (a.variant ? 0 : blockIdx.x * 32) + threadIdx.x;
  a.out<float>()[i] = 1.0f;  // BUG: two_blocks_one_element
}

CASE(two_threads_one_element, 1, 32, 0) {
  const int lane = static_cast<int>(threadIdx.x);
  a.out<float>()[a.variant ? lane / 2 : lane] = 1.0f;  // BUG: two_threads_one_element
}

CASE(read_of_another_blocks_result, 2, 32, 0) {
  float* own = a.out<float>() + blockIdx.x * 32;
  float* read = a.variant ? a.out<float>() + (1 - blockIdx.x) * 32 : own;
  const float before = read[threadIdx.x];  // BUG: read_of_another_blocks_result
  own[threadIdx.x] = before + 1.0f;        // BUG: read_of_another_blocks_result
}

// All blocks read, one writes: behind its own read are those of the blocks before it.
CASE(read_hidden_by_a_read, 4, 32, 0) {
  float* out = a.out<float>();
  const float before = out[threadIdx.x];  // BUG: read_hidden_by_a_read
  if (a.variant && blockIdx.x == 2) {
    out[threadIdx.x] = before;  // BUG: read_hidden_by_a_read
  }
}

CASE(plain_write_beside_atomics, 1, 32, 0) {
  int* out = a.out<int>();
  if (threadIdx.x == 7 && a.variant) {
    out[0] = 0;  // BUG: plain_write_beside_atomics
  } else {
    atomicAdd(&out[0], 1);  // BUG: plain_write_beside_atomics
  }
}

// Every thread adds; without a barrier, also the one whose addition came last must not read.
CASE(plain_read_after_atomics, 1, 64, 0) {
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  const int before = atomicAdd(&sum, 1);
  if (!a.variant) __syncthreads();
  if (before == 63) a.out<int>()[0] = sum;  // BUG: plain_read_after_atomics
}

CASE(copy_not_waited_for, 1, 32, 512) {
  float4* tile = dynamic_shared_memory<float4>();
  const int lane = static_cast<int>(threadIdx.x);
  copy_async_16(&tile[lane], a.in<float4>() + lane, 16);
  commit_copies();
  if (!a.variant) wait_copies<0>();
  __syncthreads();
  a.out<float>()[lane] = tile[31 - lane].x;  // BUG: copy_not_waited_for
  wait_copies<0>();
}

CASE(too_few_groups_waited_for, 1, 32, 1024) {
  float4* tile = dynamic_shared_memory<float4>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int group = 0; group < 2; ++group) {
    copy_async_16(&tile[32 * group + lane], a.in<float4>() + 32 * group + lane, 16);
    commit_copies();
  }
  if (a.variant) {
    wait_copies<1>();
  } else {
    wait_copies<0>();
  }
  __syncthreads();
  a.out<float>()[lane] = tile[lane].x + tile[63 - lane].x;  // BUG: too_few_groups_waited_for
  wait_copies<0>();
}

CASE(copy_never_waited_for, 1, 32, 512) {
  float4* tile = dynamic_shared_memory<float4>();
  copy_async_16(&tile[threadIdx.x], a.in<float4>() + threadIdx.x, 16);  // BUG: copy_never_waited_for
  if (!a.variant) commit_copies();                                      // no group, nothing to wait for
  wait_copies<0>();
}

// A thread's wait is for its own copies; the others' need a barrier.
CASE(missing_barrier_after_wait, 1, 32, 512) {
  float4* tile = dynamic_shared_memory<float4>();
  const int lane = static_cast<int>(threadIdx.x);
  copy_async_16(&tile[lane], a.in<float4>() + lane, 16);
  commit_copies();
  __syncthreads();
  wait_copies<0>();  // the copies are written at their line
  if (!a.variant) __syncthreads();
  a.out<float>()[lane] = tile[31 - lane].x;  // BUG: missing_barrier_after_wait
}

// A copy into what others may still be reading: the shuffle makes the lanes meet, and orders nothing in memory.
CASE(copy_over_readers, 1, 32, 512) {
  float4* tile = dynamic_shared_memory<float4>();
  const int lane = static_cast<int>(threadIdx.x);
  tile[lane] = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
  __syncthreads();
  a.out<float>()[lane] = __shfl_sync(~0u, tile[31 - lane].x, lane);
  if (!a.variant) __syncthreads();
  copy_async_16(&tile[lane], a.in<float4>() + lane, 16);  // BUG: copy_over_readers
  commit_copies();
  wait_copies<0>();
}

// The address of a row is one lane's, what it reads goes to four others: those must be ordered after the row's writer.
// Without a barrier, lanes may load what they stored themselves, and nothing else.
CASE(matrix_load_without_barrier, 1, 32, 512) {
  auto* words = dynamic_shared_memory<float>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 4; ++i) words[a.variant ? lane * 4 + i : i * 32 + lane] = 0.0f;
  const int meet = __shfl_sync(~0u, lane, lane);
  uint32_t matrices[4];
  load_matrices(matrices, words + meet * 4);  // BUG: matrix_load_without_barrier
  a.out<uint32_t>()[lane] = matrices[0] ^ matrices[3];
}

CASE(matrix_load_of_a_copy, 1, 32, 512) {
  uint4* tile = dynamic_shared_memory<uint4>();
  const int lane = static_cast<int>(threadIdx.x);
  copy_async_16(&tile[lane], a.in<uint4>() + lane, 16);
  commit_copies();
  if (!a.variant) wait_copies<0>();
  __syncwarp();
  uint32_t matrices[4];
  load_matrices_transposed(matrices, &tile[lane]);  // BUG: matrix_load_of_a_copy
  a.out<uint32_t>()[lane] = matrices[0] ^ matrices[3];
  wait_copies<0>();
}

CASE(misaligned_matrix_row, 1, 32, 528) {
  auto* tile = dynamic_shared_memory<unsigned char>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 528; i += 32) tile[i] = 1;
  __syncwarp();
  uint32_t matrices[2];
  load_matrices(matrices, tile + lane * 16 + (lane == 3 ? 8 * a.variant : 0));  // BUG: misaligned_matrix_row
  a.out<uint32_t>()[lane] = matrices[0] ^ matrices[1];
}

CASE(matrix_product_in_a_branch, 1, 32, 0) {
  float sums[4] = {};
  const uint32_t left[4] = {}, right[2] = {};
  if (!a.variant || threadIdx.x != 9) {
    multiply_bf16(sums, left, right);  // BUG: matrix_product_in_a_branch
  }
  a.out<float>()[threadIdx.x] = sums[0];
}

// An operand that the launch does not list.
CASE(uses_what_is_not_listed, 1, 1, 0) {
  __shared__ const float* hidden;
  hidden =
      a.variant ? reinterpret_cast<const float*>(reinterpret_cast<uintptr_t>(a.input) ^ 1ull << 45) : a.in<float>();
  a.out<float>()[0] = *hidden;  // BUG: uses_what_is_not_listed
}

CASE(misaligned_copy, 1, 1, 64) {
  float* tile = dynamic_shared_memory<float>();
  copy_async_16(tile + a.variant, a.in<float4>(), 16);  // BUG: misaligned_copy
  commit_copies();
  wait_copies<0>();
}

CASE(copy_past_the_end, 1, 1, 16) {
  float* tile = dynamic_shared_memory<float>();
  const int left = static_cast<int>(a.inputs % 4 + a.variant) * 4;
  copy_async_16(tile, a.in<float>() + a.inputs / 4 * 4, left);  // BUG: copy_past_the_end
  commit_copies();
  wait_copies<0>();
}

CASE(barrier_in_a_branch, 1, 64, 0) {
  if (!a.variant || threadIdx.x < 32) {
    __syncthreads();  // BUG: barrier_in_a_branch
  }
}

CASE(barrier_after_a_return, 1, 64, 0) {
  if (a.variant && threadIdx.x == 5) return;
  __syncthreads();  // BUG: barrier_after_a_return
}

CASE(barriers_in_two_branches, 1, 64, 0) {
  if (a.variant && threadIdx.x < 32) {
    __syncthreads();  // BUG: barriers_in_two_branches
  } else {
    __syncthreads();  // BUG: barriers_in_two_branches
  }
}

CASE(barrier_beside_a_shuffle, 1, 32, 0) {
  if (a.variant && threadIdx.x == 0) {
    __syncthreads();  // BUG: barrier_beside_a_shuffle
  } else {
    __syncwarp();  // BUG: barrier_beside_a_shuffle
  }
}

CASE(shuffle_in_a_branch, 1, 32, 0) {
  const int lane = static_cast<int>(threadIdx.x);
  float value = static_cast<float>(lane);
  if (!a.variant || lane < 16) {
    value += __shfl_xor_sync(~0u, value, 1);  // BUG: shuffle_in_a_branch
  }
  a.out<float>()[lane] = value;
}

CASE(shuffles_in_two_branches, 1, 32, 0) {
  const int lane = static_cast<int>(threadIdx.x);
  float value = static_cast<float>(lane);
  if (a.variant && lane < 16) {
    value += __shfl_xor_sync(~0u, value, 1);  // BUG: shuffles_in_two_branches
  } else {
    value += __shfl_xor_sync(~0u, value, 2);  // BUG: shuffles_in_two_branches
  }
  a.out<float>()[lane] = value;
}

CASE(mask_without_the_caller, 1, 32, 0) {
  const unsigned mask = a.variant ? 0xFFFFu : ~0u;
  const int lane = static_cast<int>(threadIdx.x);
  a.out<float>()[lane] = __shfl_sync(mask, 1.0f, 0);  // BUG: mask_without_the_caller
}

CASE(shuffle_from_outside_the_mask, 1, 32, 0) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= 16) return;
  const int from = a.variant ? lane + 1 : lane;
  a.out<float>()[lane] = __shfl_sync(0xFFFFu, 1.0f, from);  // BUG: shuffle_from_outside_the_mask
}

// A circle: lane 0 waits for 1, 1 for 2, 2 for 0.
CASE(lanes_in_a_circle, 1, 3, 0) {
  const unsigned masks[] = {0b011, 0b110, 0b101};
  __syncwarp(a.variant ? masks[threadIdx.x] : 0b111u);  // BUG: lanes_in_a_circle
}

CASE(lock_held_by_another_block, 2, 1, 0) {
  int* lock = a.out<int>();
  while (atomicCAS(lock, 0, 1) != 0) {  // BUG: lock_held_by_another_block
  }
  if (!a.variant) atomicExch(lock, 0);
}

// Whose result depends on the order of the additions; no rule of memory is broken.
CASE(sum_of_atomics, 4, 64, 0) {
  const int64_t i = blockIdx.x * 64 + threadIdx.x;
  float* out = a.out<float>();
  if (a.variant) {
    atomicAdd(&out[0], a.in<float>()[i]);
    return;
  }
  if (i > 0) return;
  float sum = 0.0f;
  for (int64_t k = 0; k < a.inputs; ++k) sum += a.in<float>()[k];
  out[0] = sum;
}
