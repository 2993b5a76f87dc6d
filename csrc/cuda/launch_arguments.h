// What a launch is told.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>

#include "../common/describe.h"

namespace peft_kernels {

// Blocks in each direction, up to 2^31 - 1 along x and 65535 along y and z.
struct Grid {
  int64_t x = 1, y = 1, z = 1;
  int threads = 0;
  size_t dynamic_shared_bytes = 0;
};

enum class Access { read, write };

// A tensor that a kernel touches: named in error messages, and all the global memory that the kernel may reach. On a
// GPU nothing holds it to that or to `access`; the executor of tests/simt does.
struct Operand {
  const char* name;
  const Tensor& tensor;
  Access access = Access::read;
};

}  // namespace peft_kernels
