// Violations: what a message says and how it gets out of a fiber.
#pragma once

#include <cstdint>
#include <string>

#include "executor.h"

namespace simt {

// Ends the launch: control returns to the host, which throws. The kinds are fixed strings that tests match:
//   divergent barrier, divergent warp operation, out-of-bounds global read, out-of-bounds global write,
//   out-of-bounds shared read, out-of-bounds shared write, write to a read-only operand,
//   read of uninitialised shared memory, race on shared memory, race on global memory, copy not waited for,
//   misaligned access
// The source line is that of `pc` (relative to the kernel's library), else of the kernel's frame that called.
[[noreturn]] void violation(const char* kind, const std::string& text, uint32_t pc = 0);
[[noreturn]] void violation_at(Site site, const char* kind, const std::string& text);

// Host side: whether the launch ended in a violation; the exception's text; ready for the next launch.
bool violated();
std::string take_report();

// "csrc/cuda/lora.cu:52"
std::string describe(const Site& site);
std::string describe_pc(uint32_t pc);
std::string describe_block(const Index& block);

// The library that the kernel of this launch is in; addresses of code are kept relative to its base.
void set_kernel_library(const void* kernel);
uintptr_t kernel_library_base();
const char* kernel_library_path();
inline uint32_t relative_pc(const void* return_address) {
  // One back, so that it lies in the call and not after it.
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(return_address) - 1 - kernel_library_base());
}

}  // namespace simt
