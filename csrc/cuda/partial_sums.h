// The second stage of sums that are split over blocks: partial results are added in a fixed order, never by atomics.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "dtypes.h"

namespace peft_kernels {

using torch::stable::Tensor;

// How a loop of `steps` is cut over blocks. A split is worth its partial sums only while it still takes four steps;
// the wish for blocks is a constant, since the order of additions must not depend on the machine.
struct Splits {
  int steps_per_split, count;
};

inline Splits split_steps(int steps, int64_t blocks_beside) {
  constexpr int kWantedBlocks = 132 * 4, kLeastSteps = 4;
  const auto wanted = static_cast<int>(kWantedBlocks / (blocks_beside > 0 ? blocks_beside : 1));
  const int most = steps / kLeastSteps, cut = wanted < most ? wanted : most;
  if (cut <= 1) return {steps, 1};
  const int each = (steps + cut - 1) / cut;
  return {each, (steps + each - 1) / each};
}

// out = the sum of partial [splits, numel of out] over the splits; partial float32, both contiguous.
void add_partial_sums(const char* operation, const Tensor& partial, const Tensor& out);

}  // namespace peft_kernels
