// What cross_entropy_rows_ asks of its arguments, on every device, before anything changes; in the words of
// lora_checks.h. That labels are below V is not checked here: on a GPU that would wait for it.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "sparse_checks.h"

namespace peft_kernels {

// logits [C, V], labels [C].
inline void check_cross_entropy_rows(
    const char* op, const Tensor& logits, const Tensor& labels, double scale, bool takes_float64) {
  check_activations(op, "logits", logits, takes_float64);
  STD_TORCH_CHECK(
      logits.size(1) >= 1 && (logits.stride(1) == 1 || logits.size(1) == 1), op,
      ": logits must be [C, V >= 1] with contiguous rows, got ", described(logits), " with strides ",
      strides_of(logits));
  STD_TORCH_CHECK(
      logits.size(0) <= 1 || logits.stride(0) >= logits.size(1), op, ": logits must have rows apart from each other, ",
      "got ", described(logits), " with strides ", strides_of(logits));
  STD_TORCH_CHECK(
      labels.scalar_type() == ScalarType::Long && labels.dim() == 1 && labels.size(0) == logits.size(0), op,
      ": labels must be int64 [", logits.size(0), "], got ", described(labels));
  check_device(op, "labels", labels, logits);
  STD_TORCH_CHECK(scale == scale && scale - scale == 0.0, op, ": scale must be finite, got ", scale);
}

}  // namespace peft_kernels
