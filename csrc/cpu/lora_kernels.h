// The raw-pointer LoRA kernels of one instruction set; lora_products.cpp casts the factors and threads.
//
// Activations are row-major with unit column stride. `acc` below is float, or double for double activations. A product
// runs in two steps, so that each instruction set may lay out the small operand as it likes: pack it, then run over
// the activations. Both steps take ranges, which lora_products.cpp hands to threads.
#pragma once

#include <cstdint>

#include "../common/philox.h"
#include "dtypes.h"
#include "rounding.h"

namespace peft_kernels {

// Columns per unit of packing: one Philox batch.
constexpr int64_t kPanel = 64;
// Columns per task of the factor gradient. Wide, as a task walks down all rows: every row of it lies in another page.
constexpr int64_t kGradColumns = 4 * kPanel;
// Rows per unit of packing in the factor gradient.
constexpr int64_t kPackRows = 32;

struct Dropout {
  bool active = false;
  RngState state = {0, 0};
  uint32_t threshold = 0;
  double scale = 1.0;
  // The mask as drawn before, where it is: bit c % 64 of keep[m * keep_stride + c / 64]. Else it is drawn on the way.
  const uint64_t* keep = nullptr;
  int64_t keep_stride = 0;
};

// An activation matrix; `data` points at row 0, so that masks know their rows.
struct Matrix {
  void* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
};

// A factor [rank, columns] in acc, any strides, times `scale`.
struct Factor {
  const void* data;
  int64_t rank;
  int64_t columns;
  int64_t rank_stride;
  int64_t column_stride;
  double scale;
};

// hidden [rows, rank] in acc, contiguous.
struct Hidden {
  void* data;
  int64_t rank;
};

// The three skinny products for one activation dtype. Ranges [begin, end) are of columns for the factor packers, in
// multiples of kPanel but for the end; of rows for `shrink` and `accumulate`, in multiples of row_unit likewise.
struct SkinnyKernels {
  int64_t row_unit;

  // hidden[m, j] = sum_c (D x)[m, c] factor[j, c]; the scale of kept elements must be in factor.scale.
  int64_t (*shrink_packed_bytes)(const Factor& factor);
  void (*shrink_pack)(const Factor& factor, int64_t begin, int64_t end, void* packed);
  void (*shrink)(
      const Matrix& x, int64_t begin, int64_t end, const Factor& factor, const void* packed, const Hidden& hidden,
      const Dropout& dropout);

  // out[m, c] += keep[m, c] sum_j hidden[m, j] factor[j, c]; the scale of kept elements must be in factor.scale.
  int64_t (*accumulate_packed_bytes)(const Factor& factor);
  void (*accumulate_pack)(const Factor& factor, int64_t begin, int64_t end, void* packed);
  void (*accumulate)(
      const Matrix& out, int64_t begin, int64_t end, const Hidden& hidden, const Factor& factor, const void* packed,
      const Dropout& dropout);

  // partial[j, c] = sum over rows [begin, end) of keep x[m, c] hidden[m, j], for columns [first_column, end_column), at
  // most kGradColumns of them from a multiple of kGradColumns on; partial is [rank, columns] in acc. Packing ranges
  // over rows in multiples of kPackRows; so does `begin`.
  int64_t (*grad_packed_bytes)(int64_t rows, int64_t rank);
  void (*grad_pack)(const Hidden& hidden, int64_t rows, int64_t begin, int64_t end, void* packed);
  void (*grad)(
      const Matrix& x, int64_t begin, int64_t end, int64_t first_column, int64_t end_column, int64_t rank,
      const void* packed, void* partial, const Dropout& dropout);
};

struct GemmKernel;

struct LoraKernels {
  const char* capability;
  SkinnyKernels products[kDTypes];  // indexed by DType
  // keep[m, c] of the mask for rows [begin, end).
  void (*dropout_mask)(bool* keep, int64_t columns, int64_t begin, int64_t end, const Dropout& dropout);
  // The same as words: bit c % 64 of keep[m * divide_up(columns, 64) + c / 64].
  void (*keep_words)(uint64_t* keep, int64_t columns, int64_t begin, int64_t end, const Dropout& dropout);
  // The large product with the low-rank one in it, indexed by DType; null where the library GEMM is the best there is.
  const GemmKernel* gemms[kDTypes];
};

extern const LoraKernels lora_kernels_baseline;
#if defined(__x86_64__)
extern const LoraKernels lora_kernels_avx2;
extern const LoraKernels lora_kernels_avx512;
extern const SkinnyKernels lora_kernels_amx_bf16;
// Whether processor and kernel let this process use the bf16 matrix tiles; asks the kernel for them.
bool amx_bf16_usable();
#endif

}  // namespace peft_kernels
