// Included before every source that is compiled for the executor.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <common/describe.h>  // before the macro: messages go on telling devices apart
#include <cuda_runtime.h>     // as nvcc does

#include "simt/blocks.h"

// Operators that ask for CUDA tensors get those of the CPU, where the executor runs them.
#define is_cuda() is_cpu()
