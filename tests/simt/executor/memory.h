// What a kernel may access, and the check of every access it makes.
//
// Three kinds of memory besides a fiber's own stack: the operands of the launch (global memory), dynamic shared memory
// (an arena of exactly the launch's size, with nothing accessible around it), and static shared memory (__shared__
// variables, which are static variables of the kernel's library and known from its symbol table).
#pragma once

#include <cstddef>
#include <cstdint>

#include "races.h"

namespace simt {

// The stack of the running fiber, whose accesses are nobody else's business. Outside launches, everything.
struct WatchedStack {
  uintptr_t low = 0;
  uintptr_t bytes = UINTPTR_MAX;
};
extern thread_local WatchedStack watched_stack __attribute__((tls_model("initial-exec")));

inline void watch_stack(void* low, size_t bytes) {
  watched_stack = {reinterpret_cast<uintptr_t>(low), static_cast<uintptr_t>(bytes)};
}
inline void watch_nothing() { watched_stack = {}; }

// Before an access of the running thread; `return_address` is where the kernel goes on. Raises violations.
void check_access(uintptr_t address, size_t bytes, Use use, const void* return_address);
// The same with an address of code relative to the kernel's library.
void check_access_from(uintptr_t address, size_t bytes, Use use, uint32_t pc);
void check_alignment(uintptr_t address, size_t alignment, uint32_t pc);

bool is_shared(uintptr_t address);

// The destination of an asynchronous copy: checked like a write, and out of bounds for everybody until completed.
void begin_pending(uintptr_t shared, size_t bytes, uint32_t pc);
void end_pending(uintptr_t shared, size_t bytes, uint32_t pc);

// For each launch and each block.
void begin_launch_memory();
void begin_block_memory();

}  // namespace simt
