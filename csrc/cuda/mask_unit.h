// The work of one thread of dropout_mask: 16 neighboring columns of a row, two Philox calls and one 16-byte store.
// Shared with the CPU like lora_tile.h.
#pragma once

#include <cstdint>

#include "../common/philox.h"

namespace peft_kernels {

constexpr int kMaskUnit = 2 * kPhiloxGroup;

// keep is bool [rows, columns], contiguous and 16-byte aligned, as torch allocates it.
struct MaskArguments {
  uint8_t* keep;
  const int64_t* rng_state;
  int64_t rows, columns;
  uint32_t threshold;
};

PK_HOST_DEVICE int64_t mask_units(int64_t rows, int64_t columns) {
  return rows * ((columns + kMaskUnit - 1) / kMaskUnit);
}

// `unit` counts units along the rows; one past the last row does nothing.
PK_HOST_DEVICE void write_mask_unit(const MaskArguments& a, int64_t unit) {
  struct alignas(16) Bytes {
    uint32_t words[4];
  };
  const int64_t units_per_row = (a.columns + kMaskUnit - 1) / kMaskUnit;
  const int64_t row = unit / units_per_row;
  const int64_t column = unit % units_per_row * kMaskUnit;
  if (row >= a.rows) return;
  const RngState state = {a.rng_state[0], a.rng_state[1]};
  Bytes bytes = {};
  for (int half = 0; half < 2; ++half) {
    uint32_t draws[4];
    philox_4x32_10(state, static_cast<uint32_t>(column / kPhiloxGroup + half), static_cast<uint32_t>(row), draws);
    for (int c = 0; c < kPhiloxGroup; ++c) {
      const uint32_t keep = philox_draw(draws, c) >= a.threshold;
      bytes.words[2 * half + c / 4] |= keep << (c % 4 * 8);
    }
  }
  uint8_t* keep = a.keep + row * a.columns + column;
  if (a.columns % kMaskUnit == 0) {
    *reinterpret_cast<Bytes*>(keep) = bytes;
    return;
  }
  for (int c = 0; c < kMaskUnit; ++c) {
    if (column + c < a.columns) keep[c] = static_cast<uint8_t>(bytes.words[c / 4] >> (c % 4 * 8));
  }
}

}  // namespace peft_kernels
