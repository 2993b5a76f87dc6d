// Argument checks of the CUDA operators: each message names the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "../common/describe.h"

namespace peft_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_activation_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline bool on_device_of(const Tensor& tensor, const Tensor& other) {
  return tensor.is_cuda() && tensor.get_device_index() == other.get_device_index();
}

inline void check_dropout_p(const char* operation, double dropout_p) {
  STD_TORCH_CHECK(  // written so that NaN fails
      dropout_p >= 0.0 && dropout_p <= 1.0, operation, ": dropout_p must be a probability in [0, 1], got ", dropout_p);
}

// Philox counts rows with 32 bits.
inline void check_mask_rows(const char* operation, int64_t rows) {
  STD_TORCH_CHECK(
      rows >= 0 && rows <= int64_t{1} << 32, operation, ": dropout needs between 0 and 2^32 rows, got ", rows);
}

inline void check_rng_state(const char* operation, const Tensor& rng_state) {
  STD_TORCH_CHECK(
      rng_state.scalar_type() == ScalarType::Long && rng_state.dim() == 1 && rng_state.size(0) == 2 &&
          rng_state.stride(0) == 1,
      operation, ": rng_state must be int64 [2] (seed, offset), contiguous, got ", described(rng_state));
}

}  // namespace peft_kernels
