// The checks of common/lora_checks.h in the terms of the CPU kernels.
#pragma once

#include "../common/lora_checks.h"
#include "lora_products.h"

namespace peft_kernels {

inline DType activation_dtype(const char* op, const char* name, const Tensor& tensor) {
  check_activations(op, name, tensor, true);
  return dtype_of(tensor.scalar_type());
}

// `rows` by `columns` is the matrix that is dropped from.
inline Dropout make_dropout(
    const char* op, double dropout_p, const std::optional<Tensor>& rng_state, int64_t rows, int64_t columns,
    const Tensor& like) {
  Dropout dropout;
  if (!check_dropout(op, dropout_p, rng_state, rows, columns, like)) return dropout;
  const Tensor state = rng_state->is_contiguous() ? *rng_state : torch::stable::contiguous(*rng_state);
  const int64_t* words = state.const_data_ptr<int64_t>();
  dropout.active = true;
  dropout.state = {words[0], words[1]};
  dropout.threshold = dropout_threshold(dropout_p);
  dropout.scale = dropout_scale(dropout_p);
  return dropout;
}

}  // namespace peft_kernels
