// What an argument is, for error messages of host and device operators alike.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <string>

namespace peft_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The dtype's name in Python.
inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// "cuda:0"
inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return tensor.is_cpu() ? "cpu" : "another device";
}

// "bfloat16 [3, 4] on cuda:0"
inline std::string described(const Tensor& tensor) {
  std::ostringstream text;
  text << dtype_name(tensor.scalar_type()) << " [";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i == 0 ? "" : ", ") << tensor.size(i);
  text << "] on " << device_name(tensor);
  return text.str();
}

}  // namespace peft_kernels
