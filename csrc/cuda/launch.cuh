// The one place that starts kernels: grid, block, shared memory, the current stream, and what an error says.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

namespace peft_kernels {

struct Grid {
  int64_t blocks;  // one-dimensional, up to 2^31 - 1
  int threads;
  size_t dynamic_shared_bytes = 0;
};

// The current stream of torch for this device. The caller holds the device guard.
inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// "sm_90" of 900, the way __CUDA_ARCH__ counts.
inline std::string architecture_name(int architecture) { return "sm_" + std::to_string(architecture / 10); }

inline std::string architecture_of(int32_t device) {
  int major = 0, minor = 0;
  const bool known = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  return known ? architecture_name(major * 100 + minor * 10) : "unknown architecture";
}

// Raises with all one needs to report the failure; `shapes` is the caller's account of its arguments.
[[noreturn]] inline void raise_launch_error(
    const char* operation, cudaError_t error, int32_t device, const Grid& grid, const std::string& shapes) {
  constexpr int kCompiledFor[] = {__CUDA_ARCH_LIST__};  // from nvcc's -gencode options
  std::ostringstream text;
  text << operation << ": CUDA launch failed with " << cudaGetErrorName(error) << " (" << cudaGetErrorString(error)
       << ") on cuda:" << device << ", " << architecture_of(device) << "; this library was compiled for";
  for (const int architecture : kCompiledFor) text << " " << architecture_name(architecture);
  text << "; " << shapes << "; grid " << grid.blocks << " x " << grid.threads << " threads, "
       << grid.dynamic_shared_bytes << " bytes of dynamic shared memory";
  cudaGetLastError();  // the error is reported here; leave none behind for the next check
  throw std::runtime_error(text.str());
}

// Starts `kernel(arguments)` on the current stream of `device`, which the caller's guard has made current. Returns
// without waiting; a failure to start raises. `describe()` is called only then.
template <typename Arguments, typename Describe>
void launch(
    const char* operation, int32_t device, const Grid& grid, void (*kernel)(Arguments), const Arguments& arguments,
    const Describe& describe) {
  constexpr size_t kSharedBytesWithoutOptIn = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (grid.blocks > std::numeric_limits<int32_t>::max()) error = cudaErrorInvalidConfiguration;
  if (error == cudaSuccess && grid.dynamic_shared_bytes > kSharedBytesWithoutOptIn) {
    error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
        static_cast<int>(grid.dynamic_shared_bytes));
  }
  if (error == cudaSuccess) {
    void* parameters[] = {const_cast<Arguments*>(&arguments)};
    error = cudaLaunchKernel(
        reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(grid.blocks)),
        dim3(static_cast<unsigned>(grid.threads)), parameters, grid.dynamic_shared_bytes, current_stream(device));
  }
  if (error != cudaSuccess) raise_launch_error(operation, error, device, grid, describe());
}

}  // namespace peft_kernels
