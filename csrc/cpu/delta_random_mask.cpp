// What a delta keeps at random, on the CPU: the bits of dropout, at the entries that it has.
#include "delta_entries.h"

#include <torch/csrc/stable/library.h>

#include <bit>
#include <cstring>

namespace peft_kernels {
namespace {

// mask[i] = bit i % 64 of words[i / 64].
void spread_bits(const uint64_t* words, int64_t count, bool* mask) {
  int64_t i = 0;
  if constexpr (std::endian::native == std::endian::little) {
    for (; i + 8 <= count; i += 8) {
      const uint64_t byte = words[i / 64] >> (i % 64) & 0xFF;
      // A copy of the byte in each of eight, of which copy j keeps bit j; adding 0x7F moves that to the top bit.
      const uint64_t own = byte * 0x0101010101010101u & 0x8040201008040201u;
      const uint64_t bytes = (own + 0x7F7F7F7F7F7F7F7Fu) >> 7 & 0x0101010101010101u;
      std::memcpy(mask + i, &bytes, sizeof(bytes));
    }
  }
  for (; i < count; ++i) mask[i] = words[i / 64] >> (i % 64) & 1;
}

Tensor random_mask(Tensor indices, Tensor values, int64_t columns, double dropout_p, Tensor rng_state) {
  constexpr const char* op = "delta_random_mask";
  const bool dense = check_delta(op, indices, values);
  STD_TORCH_CHECK(columns >= 1, op, ": columns must be at least 1, got ", columns);
  STD_TORCH_CHECK(
      dropout_p >= 0.0 && dropout_p <= 1.0, op, ": dropout_p must be in [0, 1], got ", dropout_p);  // NaN fails
  STD_TORCH_CHECK(
      rng_state.scalar_type() == ScalarType::Long && rng_state.dim() == 1 && rng_state.numel() == 2, op,
      ": rng_state must be int64 [2], got ", described(rng_state));
  check_device(op, "rng_state", rng_state, values);
  check_contiguous(op, "rng_state", rng_state);
  STD_TORCH_CHECK(
      !dense || values.numel() % columns == 0, op, ": values must be whole rows of ", columns, ", got ",
      described(values));
  Tensor mask = new_tensor(values, {values.numel()}, ScalarType::Bool);
  bool* to = static_cast<bool*>(mask.mutable_data_ptr());
  const int64_t count = values.numel();
  if (count == 0) return mask;
  const int64_t* state = static_cast<const int64_t*>(rng_state.const_data_ptr());
  Dropout dropout;
  dropout.active = true;
  dropout.state = {state[0], state[1]};
  dropout.threshold = dropout_threshold(dropout_p);
  const Positions at(indices, dense);
  const int64_t rows = at[count - 1] / columns + 1;
  const int64_t grain = std::max<int64_t>(1, kSplit / columns);
  torch::stable::parallel_for(0, divide_up(rows, grain), 1, [&](int64_t first_block, int64_t last_block) {
    const int64_t end_row = std::min(rows, last_block * grain);
    const Scratch memory(divide_up(columns, 64) * sizeof(uint64_t));
    uint64_t* words = static_cast<uint64_t*>(memory.get());
    if (at.dense()) {
      for (int64_t row = first_block * grain; row < end_row; ++row) {
        kernels().keep_words(words - row * divide_up(columns, 64), columns, row, row + 1, dropout);
        spread_bits(words, columns, to + row * columns);
      }
      return;
    }
    int64_t entry = at.lower_bound(0, count, first_block * grain * columns);
    const int64_t stop = at.lower_bound(entry, count, end_row * columns);
    int64_t drawn = -1;
    for (; entry < stop; ++entry) {
      const int64_t position = at[entry], row = position / columns, column = position - row * columns;
      if (row != drawn) {
        // keep_words() counts rows from `keep` on, so `keep` is where row 0 would be.
        kernels().keep_words(words - row * divide_up(columns, 64), columns, row, row + 1, dropout);
        drawn = row;
      }
      to[entry] = words[column / 64] >> (column % 64) & 1;
    }
  });
  return mask;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) { m.impl("delta_random_mask", TORCH_BOX(&peft_kernels::random_mask)); }
