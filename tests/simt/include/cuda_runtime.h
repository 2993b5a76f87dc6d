// The part of CUDA's language extensions and intrinsics that our kernels use, for the host compiler and the executor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../executor/executor.h"
#include "simt/vectors.h"

#define SIMT_INLINE inline __attribute__((always_inline))

#define __global__
#define __device__
#define __host__
#define __forceinline__ SIMT_INLINE
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __restrict__ __restrict
// One block runs at a time. `used` keeps the compiler from removing what is only written.
#define __shared__ static __attribute__((used))
#define __constant__ static
// `__noinline__` is left out: libstdc++ uses the name as an attribute.

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())
constexpr int warpSize = 32;

using cudaStream_t = struct CUstream_st*;

using std::max;
using std::min;

#include "simt/atomics.h"
#include "simt/numbers.h"
#include "simt/warp.h"

SIMT_INLINE void __syncthreads(SIMT_HERE) { ::simt::block_barrier(::simt::BarrierKind::plain, 0, SIMT_SITE); }
SIMT_INLINE int __syncthreads_or(int predicate, SIMT_HERE) {
  return ::simt::block_barrier(::simt::BarrierKind::any, predicate, SIMT_SITE);
}
SIMT_INLINE int __syncthreads_and(int predicate, SIMT_HERE) {
  return ::simt::block_barrier(::simt::BarrierKind::all, predicate, SIMT_SITE);
}
SIMT_INLINE int __syncthreads_count(int predicate, SIMT_HERE) {
  return ::simt::block_barrier(::simt::BarrierKind::count, predicate, SIMT_SITE);
}

// Blocks and threads take turns, so every write is seen at once; a fence orders nothing for the race rules.
SIMT_INLINE void __threadfence() { __asm__ volatile("" ::: "memory"); }
SIMT_INLINE void __threadfence_block() { __asm__ volatile("" ::: "memory"); }
