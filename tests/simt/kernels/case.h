// A kernel as an operator: CASE(name, blocks, threads, dynamic shared bytes) { ... } defines the body of `name_kernel`
// and registers name(Tensor input, Tensor(a!) output, int variant). In planted.cu, variant 1 has the bug, 0 has not.
#pragma once

#include <cuda_runtime.h>
#include <launch.cuh>
#include <ptx/copy_async.h>
#include <ptx/matrix.h>
#include <shared_memory.h>
#include <torch/csrc/stable/library.h>

namespace peft_kernels {

struct CaseArguments {
  const void* input;
  void* output;
  int64_t inputs, outputs;  // elements
  int64_t output_row_stride;
  int64_t variant;

  template <typename T>
  const T* in() const {
    return static_cast<const T*>(input);
  }
  template <typename T>
  T* out() const {
    return static_cast<T*>(output);
  }
};

inline CaseArguments case_arguments(const Tensor& input, const Tensor& output, int64_t variant) {
  return {
      input.const_data_ptr(),
      output.mutable_data_ptr(),
      input.numel(),
      output.numel(),
      output.dim() > 0 ? output.stride(0) : 0,
      variant};
}

}  // namespace peft_kernels

using namespace peft_kernels;

#define CASE(name, blocks, thread_count, shared_bytes)                                              \
  static __global__ void name##_kernel(const __grid_constant__ CaseArguments a);                    \
  static void name##_case(const Tensor& input, const Tensor& output, int64_t variant) {             \
    const Grid grid = {.x = blocks, .threads = thread_count, .dynamic_shared_bytes = shared_bytes}; \
    launch(                                                                                         \
        #name, grid, name##_kernel, case_arguments(input, output, variant),                         \
        {{"input", input, Access::read}, {"output", output, Access::write}});                       \
  }                                                                                                 \
  STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels, m) {                                                  \
    m.def(#name "(Tensor input, Tensor(a!) output, int variant) -> ()");                            \
  }                                                                                                 \
  STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) { m.impl(#name, TORCH_BOX(&name##_case)); }      \
  static __global__ void name##_kernel(const __grid_constant__ CaseArguments a)
