// What the threads of a block find out together about a row that they share.
#pragma once

#include <cuda_runtime.h>

#include "tile.h"

namespace peft_kernels {

// The sum of a number of each thread, the same bits for all; once in a kernel, as its shared memory is not freed.
template <int kWarps>
__device__ __forceinline__ float block_sum(float value, int thread) {
  __shared__ float sums[kWarps];
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  if (thread % kLanes == 0) sums[thread / kLanes] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp];
  return sum;
}

}  // namespace peft_kernels
