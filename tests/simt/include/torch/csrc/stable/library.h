// Registers everything in a namespace of its own, for the CPU.
#pragma once

#include_next <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY
#undef STABLE_TORCH_LIBRARY_IMPL
#undef STABLE_TORCH_LIBRARY_FRAGMENT
#define STABLE_TORCH_LIBRARY(ns, m) _STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels_simt, m, C10_UID)
#define STABLE_TORCH_LIBRARY_FRAGMENT(ns, m) _STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels_simt, m, C10_UID)
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(peft_kernels_simt, CPU, m, C10_UID)
