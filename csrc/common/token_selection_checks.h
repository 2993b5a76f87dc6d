// What the operators that score and select tokens ask of their arguments, on every device, before anything runs; in the
// words of lora_checks.h. What a threshold or starts hold is not looked at here: on a GPU that would wait for it.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "sparse_checks.h"

namespace peft_kernels {

inline void check_block_size(const char* op, int64_t block_size) {
  STD_TORCH_CHECK(block_size >= 1, op, ": block_size must be at least 1, got ", block_size);
}

// q [B, heads, T, D], k [B, key_value_heads, T, D], starts [B, T].
inline void check_block_scores(
    const char* op, const Tensor& q, const Tensor& k, int64_t block_size, const std::optional<Tensor>& starts,
    bool takes_float64) {
  check_block_size(op, block_size);
  STD_TORCH_CHECK(q.dim() == 4, op, ": q must be [B, heads, T, D], got ", described(q));
  check_floating(op, "q", q, takes_float64);
  STD_TORCH_CHECK(
      k.dim() == 4 && k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(3) == q.size(3), op, ": k must be [",
      q.size(0), ", key_value_heads, ", q.size(2), ", ", q.size(3), "], got ", described(k));
  STD_TORCH_CHECK(
      k.size(1) >= 1 && q.size(1) % k.size(1) == 0, op, ": k must have a number of heads that divides q's, ", q.size(1),
      ", got ", described(k));
  check_dtype(op, "k", k, q);
  check_device(op, "k", k, q);
  if (!starts.has_value()) return;
  STD_TORCH_CHECK(
      starts->scalar_type() == ScalarType::Int && starts->dim() == 2 && starts->size(0) == q.size(0) &&
          starts->size(1) == q.size(2),
      op, ": starts must be int32 [", q.size(0), ", ", q.size(2), "], got ", described(*starts));
  check_device(op, "starts", *starts, q);
}

// scores [B, tokens / block_size], of which `blocks` are taken.
inline void check_select_tokens(
    const char* op, const Tensor& scores, int64_t tokens, int64_t blocks, int64_t block_size,
    const std::optional<Tensor>& threshold, bool takes_float64) {
  check_block_size(op, block_size);
  const bool wide = takes_float64 && scores.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(
      wide || scores.scalar_type() == ScalarType::Float, op, ": scores must be float32",
      takes_float64 ? " or float64" : "", ", got ", described(scores));
  STD_TORCH_CHECK(
      tokens >= 0 && tokens < int64_t{1} << 31, op, ": tokens must be in [0, 2^31), as positions are int32, got ",
      tokens);
  STD_TORCH_CHECK(
      scores.dim() == 2 && scores.size(1) == tokens / block_size, op, ": scores must be [B, ", tokens / block_size,
      "], got ", described(scores));
  STD_TORCH_CHECK(
      blocks >= 0 && blocks <= scores.size(1), op, ": blocks must be in [0, ", scores.size(1), "], got ", blocks);
  if (!threshold.has_value()) return;
  STD_TORCH_CHECK(
      threshold->dim() == 0 && threshold->scalar_type() == scores.scalar_type(), op,
      ": threshold must be a scalar in scores' dtype, ", dtype_name(scores.scalar_type()), ", got ",
      described(*threshold));
  check_device(op, "threshold", *threshold, scores);
}

}  // namespace peft_kernels
