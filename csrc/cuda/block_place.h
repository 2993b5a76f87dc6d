// Which block of a result a block of the grid takes.
#pragma once

namespace peft_kernels {

struct BlockPlace {
  int row, column;
};

// Blocks go down eight rows of blocks before they move to the next column: what runs at a time shares both operands in
// L2.
__device__ __forceinline__ BlockPlace block_place(int block, int row_blocks, int column_blocks) {
  constexpr int kGroup = 8;
  const int group = block / (kGroup * column_blocks), first = group * kGroup;
  const int height = row_blocks - first < kGroup ? row_blocks - first : kGroup;
  const int within = block - first * column_blocks;
  return {first + within % height, within / height};
}

}  // namespace peft_kernels
