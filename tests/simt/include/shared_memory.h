// Dynamic shared memory: the executor's arena.
#pragma once

#include <cuda_runtime.h>

namespace peft_kernels {

template <typename T>
SIMT_INLINE T* dynamic_shared_memory() {
  return static_cast<T*>(simt::dynamic_shared());
}

}  // namespace peft_kernels
