// Atomic operations. Each may let other threads run first, so that the order of a block's atomics depends on the seed,
// and so that a thread that spins on one does not keep the others from going on.
#include <algorithm>

#include "memory.h"
#include "report.h"

namespace simt {

namespace {

template <typename T>
T updated(AtomicKind kind, T old, T value, T compare) {
  switch (kind) {
    case AtomicKind::add:
      return old + value;
    case AtomicKind::min:
      return std::min(old, value);
    case AtomicKind::max:
      return std::max(old, value);
    case AtomicKind::exchange:
      return value;
    case AtomicKind::compare_and_swap:
      return old == compare ? value : old;
    case AtomicKind::increment:
      return old >= value ? 0 : old + 1;
    case AtomicKind::decrement:
      return old == 0 || old > value ? value : old - 1;
    default:
      break;
  }
  if constexpr (std::is_integral_v<T>) {
    if (kind == AtomicKind::bit_and) return old & value;
    if (kind == AtomicKind::bit_or) return old | value;
    if (kind == AtomicKind::bit_xor) return old ^ value;
  }
  return old;
}

template <typename T>
T perform(AtomicKind kind, T* address, T value, T compare, const void* return_address) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (at - watched_stack.low >= watched_stack.bytes) {
    if ((machine.random() & 3) == 0) give_up_turn();
    check_alignment(at, sizeof(T), relative_pc(return_address));
    check_access(at, sizeof(T), Use::atomic, return_address);
  }
  const T old = *address;
  *address = updated(kind, old, value, compare);
  return old;
}

}  // namespace

#define ATOMIC(type)                                                            \
  type atomic(AtomicKind kind, type* address, type value, type compare) {       \
    return perform(kind, address, value, compare, __builtin_return_address(0)); \
  }
ATOMIC(int)
ATOMIC(unsigned)
ATOMIC(unsigned long long)

float atomic(AtomicKind kind, float* address, float value) {
  return perform(kind, address, value, 0.0f, __builtin_return_address(0));
}
double atomic(AtomicKind kind, double* address, double value) {
  return perform(kind, address, value, 0.0, __builtin_return_address(0));
}

}  // namespace simt
