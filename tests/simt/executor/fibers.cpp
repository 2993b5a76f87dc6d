#include "fibers.h"

#include <sys/mman.h>

#include <cstdlib>

namespace simt {

#if defined(__x86_64__)
// A switch by hand costs a few nanoseconds; swapcontext makes a system call for the signal mask each time. Only the
// registers that a called function must preserve need saving.
extern "C" void simt_switch(void** save, void* load);
__asm__(
    ".text\n"
    ".local simt_switch\n"
    ".type simt_switch, @function\n"
    "simt_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size simt_switch, .-simt_switch\n");

void Fiber::reset(void* stack, size_t stack_bytes, void (*entry)()) {
  // As simt_switch leaves a stack: six registers, the return address; above it a zero that ends back traces.
  auto** top = reinterpret_cast<void**>(static_cast<char*>(stack) + stack_bytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  stack_pointer_ = top - 8;
}

void Fiber::switch_to(Fiber& from, Fiber& to) { simt_switch(&from.stack_pointer_, to.stack_pointer_); }
#else
void Fiber::reset(void* stack, size_t stack_bytes, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = stack_bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::switch_to(Fiber& from, Fiber& to) { swapcontext(&from.context_, &to.context_); }
#endif

void* stack_of(int thread) {
  constexpr int kThreads = 1024;
  constexpr size_t kGuardBytes = 4096;
  static char* const stacks = [] {
    const size_t bytes = kThreads * (kStackBytes + kGuardBytes);
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    for (int i = 0; i < kThreads; ++i) {
      mprotect(static_cast<char*>(memory) + i * (kStackBytes + kGuardBytes), kGuardBytes, PROT_NONE);
    }
    return static_cast<char*>(memory);
  }();
  return stacks + thread * (kStackBytes + kGuardBytes) + kGuardBytes;
}

}  // namespace simt
