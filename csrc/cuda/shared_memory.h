// The shared memory whose size the launch decides.
#pragma once

namespace peft_kernels {

// All of it, aligned to 128 bytes, the unit in which tiles are laid out.
template <typename T>
__device__ __forceinline__ T* dynamic_shared_memory() {
  extern __shared__ __align__(128) unsigned char peft_kernels_dynamic_shared[];
  return reinterpret_cast<T*>(peft_kernels_dynamic_shared);
}

}  // namespace peft_kernels
