// Kernels without a bug, one per feature of the executor.
#include "case.h"

// output [6, 32]: the four shuffles of `input` in segments of `variant` lanes, then of 8-byte values.
CASE(shuffles, 1, 32, 0) {
  const int lane = static_cast<int>(threadIdx.x), width = static_cast<int>(a.variant);
  const float value = a.in<float>()[lane];
  float* out = a.out<float>() + lane;
  out[0] = __shfl_sync(~0u, value, lane * 3 + 1, width);
  out[32] = __shfl_up_sync(~0u, value, 3, width);
  out[64] = __shfl_down_sync(~0u, value, 3, width);
  out[96] = __shfl_xor_sync(~0u, value, 5, width);
  out[128] = static_cast<float>(__shfl_sync(~0u, static_cast<double>(value), lane ^ 1));
  out[160] = static_cast<float>(__shfl_xor_sync(~0u, static_cast<long long>(lane) << 33, 1) >> 33);
}

// output [10, 32] of int, of input's ints.
CASE(votes, 1, 32, 0) {
  const int lane = static_cast<int>(threadIdx.x);
  const int value = a.in<int>()[lane];
  int* out = a.out<int>() + lane;
  out[0] = static_cast<int>(__ballot_sync(~0u, value > 2));
  out[32] = __any_sync(~0u, value > 100);
  out[64] = __all_sync(~0u, value >= 0);
  out[96] = static_cast<int>(__match_any_sync(~0u, value));
  int equal = 0;
  out[128] = static_cast<int>(__match_all_sync(~0u, value, &equal)) + equal;
  out[160] = static_cast<int>(__match_all_sync(~0u, 5ull << 40, &equal)) + equal;
  out[192] = __reduce_add_sync(~0u, value);
  out[224] = __reduce_min_sync(~0u, value - 3) * 100 + __reduce_max_sync(~0u, value - 3);
  out[256] = static_cast<int>(__reduce_xor_sync(~0u, static_cast<unsigned>(value)));
  // Halves of a warp, each with its own mask.
  if (lane < 16) {
    out[288] = __reduce_add_sync(0x0000FFFFu, value);
  } else {
    out[288] = __reduce_add_sync(0xFFFF0000u, value);
  }
}

// Who runs together in a branch; then the mask is one to shuffle with.
CASE(active_masks, 1, 32, 0) {
  const int lane = static_cast<int>(threadIdx.x);
  int* out = a.out<int>() + lane;
  if (lane % 3 == 0) {
    const unsigned mask = __activemask();
    out[0] = static_cast<int>(mask);
    out[32] = __shfl_sync(mask, lane, __ffs(static_cast<int>(mask)) - 1);
  } else {
    out[0] = out[32] = -1;
  }
}

// output [4, 96] of int.
CASE(block_votes, 1, 96, 0) {
  const int thread = static_cast<int>(threadIdx.x);
  int* out = a.out<int>() + thread;
  out[0] = __syncthreads_count(thread % 3 == 0);
  out[96] = __syncthreads_or(thread == 95);
  out[192] = __syncthreads_and(thread < 95);
  out[288] = static_cast<int>(blockDim.x * 1000 + gridDim.x * 100 + blockIdx.x);
}

// output of int: what 4 blocks of 64 threads do to it together.
CASE(atomics, 4, 64, 0) {
  const int i = static_cast<int>(blockIdx.x * 64 + threadIdx.x);
  int* out = a.out<int>();
  atomicAdd(&out[0], i);
  atomicMax(&out[1], i);
  atomicMin(&out[2], -i);
  atomicOr(&out[3], 1 << (i % 31));
  atomicAnd(&out[4], ~(1 << (i % 31)));
  if (atomicCAS(&out[5], 0, i + 1) == 0) atomicExch(&out[6], 1);
  atomicAdd(reinterpret_cast<unsigned*>(&out[7]), 1u);
  atomicAdd(reinterpret_cast<unsigned long long*>(&out[8]), 1ull << 31);
  atomicAdd(reinterpret_cast<float*>(&out[10]), 0.5f);
}

// The order in which blocks, and the warps of block 0, take their turns.
CASE(turns, 16, 64, 0) {
  int* out = a.out<int>();
  if (threadIdx.x == 0) out[1 + atomicAdd(&out[0], 1)] = static_cast<int>(blockIdx.x);
  if (blockIdx.x == 0) out[18 + atomicAdd(&out[17], 1)] = static_cast<int>(threadIdx.x);
}

// A reduction through static and dynamic shared memory, with both kinds of barrier.
CASE(block_sums, 3, 128, 512) {
  __shared__ float of_warps[4];
  float* values = dynamic_shared_memory<float>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  values[thread] = a.in<float>()[blockIdx.x * 128 + threadIdx.x];
  __syncwarp();
  for (int step = 16; step > 0; step /= 2) {
    const float sum = lane < step ? values[thread] + values[thread + step] : 0.0f;
    __syncwarp();
    if (lane < step) values[thread] = sum;
    __syncwarp();
  }
  if (lane == 0) of_warps[thread / 32] = values[thread];
  __syncthreads();
  if (thread == 0) a.out<float>()[blockIdx.x] = of_warps[0] + of_warps[1] + of_warps[2] + of_warps[3];
}

// Rows of 128 floats through three stages of copies; past the end of input, zeros.
CASE(copy_pipeline, 1, 32, 3 * 512) {
  constexpr int kStages = 3;
  float4* tile = dynamic_shared_memory<float4>();
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t rows = a.outputs / 128;
  const auto issue = [&](int64_t row) {
    const int64_t left = a.inputs - row * 128 - lane * 4;
    const int bytes = left >= 4 ? 16 : left > 0 ? static_cast<int>(left) * 4 : 0;
    const float* from = bytes > 0 ? a.in<float>() + row * 128 + lane * 4 : a.in<float>();
    if (row < rows) copy_async_16(&tile[row % kStages * 32 + lane], from, bytes);
    commit_copies();
  };
  for (int row = 0; row < kStages - 1; ++row) issue(row);
  for (int64_t row = 0; row < rows; ++row) {
    wait_copies<kStages - 2>();
    __syncthreads();
    issue(row + kStages - 1);
    reinterpret_cast<float4*>(a.out<float>())[row * 32 + 31 - lane] = tile[row % kStages * 32 + 31 - lane];
  }
  wait_copies<0>();
}

// input: four 8 x 8 matrices of 16 bits, one after the other; output: the lanes' registers [32, 4], as 32-bit words.
// variant: 0 plain, 1 transposed, of four; 2 and 3 the same of two.
CASE(matrix_loads, 1, 32, 512) {
  uint4* tile = dynamic_shared_memory<uint4>();
  const int lane = static_cast<int>(threadIdx.x);
  tile[lane] = a.in<uint4>()[lane];
  __syncthreads();
  uint32_t four[4] = {}, two[2] = {};
  const uint4* row = &tile[a.variant < 2 ? lane : lane % 16];
  if (a.variant == 0) load_matrices(four, row);
  if (a.variant == 1) load_matrices_transposed(four, row);
  if (a.variant == 2) load_matrices(two, row);
  if (a.variant == 3) load_matrices_transposed(two, row);
  for (int i = 0; i < 4; ++i) a.out<uint32_t>()[lane * 4 + i] = a.variant < 2 ? four[i] : i < 2 ? two[i] : 0;
}

// input: the lanes' left [32, 4] and right [32, 2] registers; output: their sums [32, 4], added to.
// variant: 0 bfloat16, 1 float16, 2 tf32.
CASE(matrix_products, 1, 32, 0) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t left[4], right[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) left[i] = a.in<uint32_t>()[lane * 4 + i];
  for (int i = 0; i < 2; ++i) right[i] = a.in<uint32_t>()[128 + lane * 2 + i];
  for (int i = 0; i < 4; ++i) sums[i] = a.out<float>()[lane * 4 + i];
  if (a.variant == 0) multiply_bf16(sums, left, right);
  if (a.variant == 1) multiply_f16(sums, left, right);
  if (a.variant == 2) multiply_tf32(sums, left, right);
  for (int i = 0; i < 4; ++i) a.out<float>()[lane * 4 + i] = sums[i];
}

// output [8] of int.
CASE(bit_functions, 1, 1, 0) {
  int* out = a.out<int>();
  out[0] = __popc(0xF0F0u) * 100 + __popcll(~0ull);
  out[1] = __ffs(0x50) * 100 + __clz(1);
  out[2] = static_cast<int>(__brev(6u));
  out[3] = static_cast<int>(__umulhi(0x80000000u, 6u));
  out[4] = __float_as_int(1.0f);
  out[5] = static_cast<int>(__uint_as_float(0x40400000u));
  out[6] = static_cast<int>(rsqrtf(0.0625f) + __fmaf_rn(2.0f, 3.0f, 4.0f) + __expf(0.0f));
  out[7] = max(min(3, 5), __ldg(a.in<int>()));
}

CASE(empty_grid, input.numel(), 32, 0) { a.out<float>()[0] = 1.0f; }

// Reads the input at offset `variant`, which may not be an element of it.
CASE(load_at, 1, 1, 0) { a.out<float>()[0] = a.in<float>()[a.variant]; }
