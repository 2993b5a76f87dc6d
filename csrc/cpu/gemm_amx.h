// A matrix product on matrix tiles with a product of rank r in the same accumulators, for bfloat16 and float32.
//
//     out = x matrix + bias + D * (hidden factor)
//
// It runs in two steps per chunk of rows, each a range that lora_products.cpp hands to threads: lay x and hidden out as
// tiles (ranges of rows), then multiply (ranges of column panels). No step depends on the number of threads, nor does
// a result.
#pragma once

#include "lora_kernels.h"

namespace peft_kernels {

// Rows and columns per unit of parallel work.
constexpr int64_t kGemmRows = 32;
constexpr int64_t kGemmColumns = 32;

struct GemmArguments {
  Matrix x;               // [M, C_in]
  const void* matrix;     // [C_in, C_out], one of its strides is 1
  int64_t depth_stride;   // from k to k + 1
  int64_t column_stride;  // from column to column
  const void* bias;       // [C_out] in x's dtype, unit stride, or null
  Hidden hidden;          // [M, r] float
  Factor factor;          // [r, C_out] float; its scale holds that of the kept elements
  const uint64_t* keep;   // keep bits of the low-rank part as in Dropout, or null
  int64_t keep_stride;    // from row to row of them
  Matrix out;             // [M, C_out]
};

// Row m of the chunk that begins at row `first` is row m - first of the laid-out tiles.
struct GemmKernel {
  // Bytes of the tiles of `rows` rows, and of one thread's workspace in `multiply`.
  int64_t (*left_bytes)(const GemmArguments& arguments, int64_t rows);
  int64_t (*workspace_bytes)(const GemmArguments& arguments, int64_t rows);
  // Rows [begin, end) of x, in multiples of kGemmRows from `first` on but for the end.
  void (*lay_out)(const GemmArguments& arguments, int64_t first, int64_t begin, int64_t end, void* tiles);
  // Columns [begin, end), in multiples of kGemmColumns but for the end, of rows [first, last); `tiles` are those of
  // `first` and on.
  void (*multiply)(
      const GemmArguments& arguments, int64_t first, int64_t last, int64_t begin, int64_t end, const void* tiles,
      void* workspace);
};

#if defined(__x86_64__)
extern const GemmKernel gemm_amx_bf16;
extern const GemmKernel gemm_amx_f32;
#endif

}  // namespace peft_kernels
