// Fibers: stacks that take turns on one thread of the operating system.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

class Fiber {
 public:
  // Makes the next switch to this fiber enter `entry`, which must not return, on the stack given.
  void reset(void* stack, size_t stack_bytes, void (*entry)());
  // Leaves `from`, the fiber that runs, and continues `to`.
  static void switch_to(Fiber& from, Fiber& to);

 private:
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_ = {};
#endif
};

constexpr size_t kStackBytes = 64 * 1024;

// Stacks with a page without access below each, mapped at the first use and kept.
void* stack_of(int thread);

}  // namespace simt
