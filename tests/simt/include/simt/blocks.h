// memcpy and its like. The compiler expands them after the pass that watches accesses, so those that it would not turn
// into one load and one store go to the executor.
#pragma once

#include <cstddef>
#include <cstring>

extern "C" {
void* simt_memcpy(void* to, const void* from, size_t bytes);
void* simt_memmove(void* to, const void* from, size_t bytes);
void* simt_memset(void* to, int value, size_t bytes);

#define SIMT_REPLACE extern inline __attribute__((gnu_inline, always_inline, artificial))

SIMT_REPLACE void* memcpy(void* __restrict to, const void* __restrict from, size_t bytes) noexcept {
  const bool one_access = __builtin_constant_p(bytes) && (bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8);
  return one_access ? __builtin_memcpy(to, from, bytes) : simt_memcpy(to, from, bytes);
}
SIMT_REPLACE void* memmove(void* to, const void* from, size_t bytes) noexcept { return simt_memmove(to, from, bytes); }
SIMT_REPLACE void* memset(void* to, int value, size_t bytes) noexcept { return simt_memset(to, value, bytes); }

#undef SIMT_REPLACE
}
