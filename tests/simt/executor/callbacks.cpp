// What -fsanitize=thread makes the compiler call before each access, and memcpy and its like (simt/blocks.h).
//
// Accesses to the running fiber's own stack are dismissed first; they are the most frequent by far. Outside launches
// every access is.
#include <cstring>

#include "memory.h"
#include "report.h"

using simt::Use;

namespace {

inline bool is_private(const void* address) {
  return reinterpret_cast<uintptr_t>(address) - simt::watched_stack.low < simt::watched_stack.bytes;
}

template <size_t bytes, bool aligned>
inline void access(const void* address, Use use, const void* return_address) {
  if (__builtin_expect(is_private(address), 1)) return;
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (aligned && at % bytes != 0) simt::check_alignment(at, bytes, simt::relative_pc(return_address));
  simt::check_access(at, bytes, use, return_address);
}

inline void access_range(const void* address, size_t bytes, Use use, const void* return_address) {
  if (bytes == 0 || is_private(address)) return;
  simt::check_access(reinterpret_cast<uintptr_t>(address), bytes, use, return_address);
}

}  // namespace

#define ACCESS(bytes)                                                       \
  SIMT_API void __tsan_read##bytes(void* address) {                         \
    access<bytes, true>(address, Use::read, __builtin_return_address(0));   \
  }                                                                         \
  SIMT_API void __tsan_write##bytes(void* address) {                        \
    access<bytes, true>(address, Use::write, __builtin_return_address(0));  \
  }                                                                         \
  SIMT_API void __tsan_unaligned_read##bytes(void* address) {               \
    access<bytes, false>(address, Use::read, __builtin_return_address(0));  \
  }                                                                         \
  SIMT_API void __tsan_unaligned_write##bytes(void* address) {              \
    access<bytes, false>(address, Use::write, __builtin_return_address(0)); \
  }

// The atomics of host code, such as reference counts; kernels use CUDA's. They must be here to be defined at all.
#define ATOMIC_UPDATE(bits, type, name)                                                 \
  SIMT_API type __tsan_atomic##bits##_##name(volatile type* address, type value, int) { \
    return __atomic_##name(address, value, __ATOMIC_SEQ_CST);                           \
  }
#define ATOMICS(bits, type)                                                                                  \
  SIMT_API type __tsan_atomic##bits##_load(const volatile type* address, int) {                              \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                                       \
  }                                                                                                          \
  SIMT_API void __tsan_atomic##bits##_store(volatile type* address, type value, int) {                       \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                          \
  SIMT_API type __tsan_atomic##bits##_exchange(volatile type* address, type value, int) {                    \
    return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);                                            \
  }                                                                                                          \
  SIMT_API int __tsan_atomic##bits##_compare_exchange_strong(                                                \
      volatile type* address, type* expected, type value, int, int) {                                        \
    return __atomic_compare_exchange_n(address, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }                                                                                                          \
  SIMT_API int __tsan_atomic##bits##_compare_exchange_weak(                                                  \
      volatile type* address, type* expected, type value, int, int) {                                        \
    return __atomic_compare_exchange_n(address, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }                                                                                                          \
  SIMT_API type __tsan_atomic##bits##_compare_exchange_val(                                                  \
      volatile type* address, type expected, type value, int, int) {                                         \
    __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);       \
    return expected;                                                                                         \
  }                                                                                                          \
  ATOMIC_UPDATE(bits, type, fetch_add)                                                                       \
  ATOMIC_UPDATE(bits, type, fetch_sub)                                                                       \
  ATOMIC_UPDATE(bits, type, fetch_and)                                                                       \
  ATOMIC_UPDATE(bits, type, fetch_or)                                                                        \
  ATOMIC_UPDATE(bits, type, fetch_xor)                                                                       \
  ATOMIC_UPDATE(bits, type, fetch_nand)

extern "C" {

ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

SIMT_API void __tsan_read_range(void* address, size_t bytes) {
  access_range(address, bytes, Use::read, __builtin_return_address(0));
}
SIMT_API void __tsan_write_range(void* address, size_t bytes) {
  access_range(address, bytes, Use::write, __builtin_return_address(0));
}

SIMT_API void* simt_memcpy(void* to, const void* from, size_t bytes) {
  access_range(from, bytes, Use::read, __builtin_return_address(0));
  access_range(to, bytes, Use::write, __builtin_return_address(0));
  return std::memcpy(to, from, bytes);
}
SIMT_API void* simt_memmove(void* to, const void* from, size_t bytes) {
  access_range(from, bytes, Use::read, __builtin_return_address(0));
  access_range(to, bytes, Use::write, __builtin_return_address(0));
  return std::memmove(to, from, bytes);
}
SIMT_API void* simt_memset(void* to, int value, size_t bytes) {
  access_range(to, bytes, Use::write, __builtin_return_address(0));
  return std::memset(to, value, bytes);
}

SIMT_API void __tsan_init() {}
SIMT_API void __tsan_func_entry(void*) {}
SIMT_API void __tsan_func_exit() {}
SIMT_API void __tsan_vptr_update(void**, void*) {}
SIMT_API void __tsan_vptr_read(void**) {}
SIMT_API void __tsan_atomic_thread_fence(int) {}
SIMT_API void __tsan_atomic_signal_fence(int) {}

ATOMICS(8, unsigned char)
ATOMICS(16, unsigned short)
ATOMICS(32, unsigned)
ATOMICS(64, unsigned long)

}  // extern "C"
