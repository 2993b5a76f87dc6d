// cp.async (sm_80): copies from global to shared memory that pass by the registers and are waited for in groups.
#pragma once

#include <cstdint>

namespace peft_kernels {

// What shared-memory instructions take instead of a generic pointer.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes, both sides aligned to as many; the first `bytes` (0 to 16) are read, the rest become zero.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Closes a group: this thread's copies since the last one.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` groups of this thread are in flight. Other threads' copies need a barrier on top.
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace peft_kernels
