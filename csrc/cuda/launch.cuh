// The one place that starts kernels: grid, block, shared memory, the current stream, and what an error says.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "launch_arguments.h"

namespace peft_kernels {

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

// Raises with all one needs to report the failure.
[[noreturn]] inline void raise_launch_error(
    const char* operation, cudaError_t error, int32_t device, const Grid& grid,
    std::initializer_list<Operand> operands) {
  constexpr int kCompiledFor[] = {__CUDA_ARCH_LIST__};  // from nvcc's -gencode options
  std::ostringstream text;
  text << operation << ": CUDA launch failed with " << cudaGetErrorName(error) << " (" << cudaGetErrorString(error)
       << ") on cuda:" << device << ", " << architecture_of(device) << "; this library was compiled for";
  for (const int architecture : kCompiledFor) text << " " << architecture_name(architecture);
  text << "; ";
  for (const Operand& operand : operands) text << operand.name << " " << described(operand.tensor) << ", ";
  text << "grid " << grid.x << " x " << grid.y << " x " << grid.z << " of " << grid.threads << " threads, "
       << grid.dynamic_shared_bytes << " bytes of dynamic shared memory";
  cudaGetLastError();  // the error is reported here; leave none behind for the next check
  throw std::runtime_error(text.str());
}

// Starts `kernel(arguments)` on the current stream of the first operand's device, which the caller's guard has made
// current. Returns without waiting; a failure to start raises.
template <typename Arguments>
void launch(
    const char* operation, const Grid& grid, void (*kernel)(Arguments), const Arguments& arguments,
    std::initializer_list<Operand> operands) {
  // Of 48 KiB that a block may have without asking; static shared memory comes on top of what is dynamic.
  constexpr size_t kSharedBytesWithoutOptIn = 32 * 1024;
  constexpr int64_t kMostAlongX = std::numeric_limits<int32_t>::max(), kMostAlongYZ = 65535;
  const auto* function = reinterpret_cast<const void*>(kernel);
  const int32_t device = operands.begin()->tensor.get_device_index();
  cudaError_t error = cudaSuccess;
  if (grid.x > kMostAlongX || grid.y > kMostAlongYZ || grid.z > kMostAlongYZ) error = cudaErrorInvalidConfiguration;
  if (error == cudaSuccess && grid.dynamic_shared_bytes > kSharedBytesWithoutOptIn) {
    error = cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.dynamic_shared_bytes));
  }
  if (error == cudaSuccess) {
    void* parameters[] = {const_cast<Arguments*>(&arguments)};
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    error = cudaLaunchKernel(
        function, blocks, dim3(static_cast<unsigned>(grid.threads)), parameters, grid.dynamic_shared_bytes,
        current_stream(device));
  }
  if (error != cudaSuccess) raise_launch_error(operation, error, device, grid, operands);
}

}  // namespace peft_kernels
