// launch() into the executor, with the interface of csrc/cuda/launch.cuh.
#pragma once

#include <cuda_runtime.h>
#include <launch_arguments.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace peft_kernels {

// What every thread runs. Not watched: the arguments lie on the launching thread's stack, as a GPU has them in constant
// memory.
template <typename Arguments>
__attribute__((no_sanitize_thread)) void call_kernel(const void* kernel, const void* arguments) {
  const auto function = reinterpret_cast<void (*)(Arguments)>(const_cast<void*>(kernel));
  function(*static_cast<const Arguments*>(arguments));
}

template <typename Arguments>
void launch(
    const char* operation, const Grid& grid, void (*kernel)(Arguments), const Arguments& arguments,
    std::initializer_list<Operand> operands) {
  std::vector<std::string> descriptions;
  std::vector<std::vector<int64_t>> shapes;
  std::vector<simt::OperandView> views;
  for (const Operand& operand : operands) {
    const Tensor& tensor = operand.tensor;
    const bool writable = operand.access == Access::write;
    descriptions.push_back(described(tensor));
    std::vector<int64_t> sizes, strides;
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      sizes.push_back(tensor.size(i));
      strides.push_back(tensor.stride(i));
    }
    shapes.push_back(std::move(sizes));
    shapes.push_back(std::move(strides));
    const void* data = writable ? tensor.mutable_data_ptr() : tensor.const_data_ptr();
    views.push_back(
        {operand.name, nullptr, data, writable, static_cast<int64_t>(tensor.element_size()),
         static_cast<int>(tensor.dim()), nullptr, nullptr});
  }
  for (size_t i = 0; i < views.size(); ++i) {
    views[i].description = descriptions[i].c_str();
    views[i].sizes = shapes[2 * i].data();
    views[i].strides = shapes[2 * i + 1].data();
  }
  const simt::Launch description = {
      operation,
      grid.x,
      grid.y,
      grid.z,
      grid.threads,
      grid.dynamic_shared_bytes,
      reinterpret_cast<const void*>(kernel),
      call_kernel<Arguments>,
      &arguments,
      views.data(),
      static_cast<int>(views.size())};
  simt::run(description);
}

}  // namespace peft_kernels
