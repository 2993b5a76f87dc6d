// The gradient of a slice of channels on matrix tiles, for bfloat16 and float32; slice_grad.cpp blocks and threads.
//
// product [few, many] += few^T many over a chunk of rows: `few` are transposed columns, kept whole as left operands;
// `many` is laid out as right operands on the way.
#pragma once

#include "lora_kernels.h"

namespace peft_kernels {

constexpr int64_t kSliceColumns = 32;  // of either operand in a block of the product
constexpr int64_t kSliceDepth = 32;    // rows of either operand are padded to multiples of this, with zeros

// Transposed columns as left tiles of bfloat16 terms: [few / 32][steps of 32 rows][terms][2 tiles][16 columns][32
// rows].
struct SliceColumns {
  uint16_t* tiles;
  int64_t few;  // a multiple of kSliceColumns
  int64_t steps;
};

struct SliceTiles {
  int64_t terms;          // bfloat16 terms of a number
  int64_t element_bytes;  // of a number
  int64_t chunk_rows;     // of M at a time

  // Up to kSliceColumns columns from `begin` on, a multiple of it: numbers contiguous in M, `stride` elements apart,
  // with zeros behind the last one up to a multiple of 16, or, for bfloat16, 32.
  void (*pack)(const void* columns, int64_t stride, int64_t depth, int64_t begin, int64_t end, const SliceColumns& to);
  // Adds a chunk of rows from `first` on, of columns [begin, end) of `many`, to the sums of all the few,
  // [columns / 32][few / 32][32 x 32], or sets them where `add` is false. `workspace` holds kSliceColumns columns of a
  // chunk.
  void (*multiply)(
      const SliceColumns& few, const Matrix& many, int64_t first, int64_t begin, int64_t end, bool add, void* workspace,
      float* sums);
  // The sums of `rows` of the few and `columns` of the many as rows of floats, `stride` apart, or added to these.
  void (*store)(const float* sums, int64_t few, int64_t rows, int64_t columns, bool add, float* to, int64_t stride);
};

#if defined(__x86_64__)
extern const SliceTiles slice_tiles_bf16;
extern const SliceTiles slice_tiles_f32;
#endif

}  // namespace peft_kernels
