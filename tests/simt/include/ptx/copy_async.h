// cp.async in the executor.
#pragma once

#include <cuda_runtime.h>

namespace peft_kernels {

SIMT_INLINE void copy_async_16(void* shared, const void* global, int bytes) {
  simt::copy_async_16(shared, global, bytes);
}

SIMT_INLINE void commit_copies() { simt::commit_copies(); }

template <int pending>
SIMT_INLINE void wait_copies() {
  simt::wait_copies(pending);
}

}  // namespace peft_kernels
