// The raw-pointer kernels of the sampled product for one instruction set; sampled_product.cpp blocks and threads.
//
// An entry (n, k) is the dot product of column n of grad_out and column k of x, over M. So both are transposed first, a
// block of columns over a chunk of rows at a time, into columns that are contiguous in M. They hold float, or double
// for double activations; bfloat16 stays as it is where the processor multiplies it.
#pragma once

#include "lora_kernels.h"

namespace peft_kernels {

// Elements of the transposed columns; a sum over M is one over `lanes` partial sums, so columns are padded to that.
struct SampledKernel {
  int64_t element_bytes;
  int64_t lanes;

  // Columns [begin, end) of rows [first, first + rows), each `stride` elements after the one before, followed by zeros
  // up to a multiple of `lanes`.
  void (*transpose)(
      const Matrix& matrix, int64_t first, int64_t rows, int64_t begin, int64_t end, void* columns, int64_t stride);

  // sums[i] += left . columns[indices[i] - base] for i < count; depth is a multiple of `lanes`. Each sum is formed in
  // the same order, whatever the other entries are. For indices of int32 and of int64.
  void (*dot_int32)(
      const void* left, const void* columns, int64_t stride, int64_t depth, const int32_t* indices, int64_t base,
      int64_t count, void* sums);
  void (*dot_int64)(
      const void* left, const void* columns, int64_t stride, int64_t depth, const int64_t* indices, int64_t base,
      int64_t count, void* sums);
};

struct SampledKernels {
  SampledKernel products[kDTypes];  // indexed by DType
};

// Rows [n, n + rows) of the product, at most kTileRows of them, in one block of columns of x. The entries of row n + i
// there are those from starts[i * starts_step] up to starts[i * starts_step + 1].
constexpr int64_t kTileRows = 32;
constexpr int64_t kTileColumns = 32;

template <typename Index>
struct TileRows {
  const void* left;  // columns of grad_out, transposed
  int64_t stride;    // from column to column
  int64_t depth;     // a multiple of 32
  int64_t rows;
  const void* tiles;  // of the block
  int64_t columns;    // in the block
  const Index* indices;
  int64_t base;       // the position of row n and the block's first column
  int64_t base_step;  // K
  const int64_t* starts;
  int64_t starts_step;
  float* sums;
};

// The same product by matrix tiles: 32 x 32 entries at once, of which those that are asked for are added to the sums.
struct SampledTiles {
  // Rows [first, first + rows) of columns [begin, end), where `begin` is the first one of a tile, as right operands.
  void (*lay_out)(const Matrix& x, int64_t first, int64_t rows, int64_t begin, int64_t end, void* tiles);
  void (*multiply_int32)(const TileRows<int32_t>& block);
  void (*multiply_int64)(const TileRows<int64_t>& block);

  // product [32, columns], rows `product_stride` apart, of all the 32 transposed columns of grad_out and a block's
  // columns, a multiple of 32.
  void (*multiply_all)(
      const void* left, int64_t stride, int64_t depth, const void* tiles, int64_t columns, float* product,
      int64_t product_stride);
};

// The kernels for activations of a dtype, and their matrix tiles, or null.
const SampledKernel& sampled_kernel_for(DType dtype);
const SampledTiles* sampled_tiles_for(DType dtype);

extern const SampledKernels sampled_kernels_baseline;
#if defined(__x86_64__)
extern const SampledKernels sampled_kernels_avx2;
extern const SampledKernels sampled_kernels_avx512;
extern const SampledKernels sampled_kernels_avx512bf16;
extern const SampledTiles sampled_tiles_bf16;
#endif

}  // namespace peft_kernels
