// Atomic operations of the types that the hardware has.
#pragma once

#define SIMT_ATOMIC(name, kind, type) \
  SIMT_INLINE type name(type* address, type value) { return ::simt::atomic(::simt::AtomicKind::kind, address, value); }
#define SIMT_ATOMIC_INTEGER(name, kind) \
  SIMT_ATOMIC(name, kind, int)          \
  SIMT_ATOMIC(name, kind, unsigned)     \
  SIMT_ATOMIC(name, kind, unsigned long long)

SIMT_ATOMIC_INTEGER(atomicAdd, add)
SIMT_ATOMIC(atomicAdd, add, float)
SIMT_ATOMIC(atomicAdd, add, double)
SIMT_ATOMIC_INTEGER(atomicMin, min)
SIMT_ATOMIC_INTEGER(atomicMax, max)
SIMT_ATOMIC_INTEGER(atomicExch, exchange)
SIMT_ATOMIC(atomicExch, exchange, float)
SIMT_ATOMIC_INTEGER(atomicAnd, bit_and)
SIMT_ATOMIC_INTEGER(atomicOr, bit_or)
SIMT_ATOMIC_INTEGER(atomicXor, bit_xor)
SIMT_ATOMIC(atomicInc, increment, unsigned)
SIMT_ATOMIC(atomicDec, decrement, unsigned)

SIMT_INLINE int atomicSub(int* address, int value) { return atomicAdd(address, -value); }
SIMT_INLINE unsigned atomicSub(unsigned* address, unsigned value) { return atomicAdd(address, 0u - value); }

template <typename T>
SIMT_INLINE T atomicCAS(T* address, T compare, T value) {
  return ::simt::atomic(::simt::AtomicKind::compare_and_swap, address, value, compare);
}
