// The raw-pointer kernels of the selection of entries for one instruction set: tiles of grad_out^T x in the
// accumulation dtype, and the numbers of a row that reach a threshold. product_above.cpp and outer_product_topk.cpp
// block and thread them.
//
// Operands are packed into panels of as many columns as a tile has, row after row [panel][M][width], zeros behind the
// last column: so a tile reads both one after the other.
#pragma once

#include "lora_kernels.h"

namespace peft_kernels {

struct SelectionProduct {
  int64_t left_width;   // columns of grad_out in a panel
  int64_t right_width;  // columns of x in a panel

  // All rows of columns [begin, end) as panels of that width, which `begin` is a multiple of. Packed numbers are of the
  // accumulation dtype.
  void (*pack_left)(const Matrix& matrix, int64_t begin, int64_t end, void* panels);
  void (*pack_right)(const Matrix& matrix, int64_t begin, int64_t end, void* panels);

  // product [rows, columns], rows `stride` apart, of whole panels: rows and columns are multiples of the widths. Each
  // sum is formed in the same order, whatever the others are. It is added to what is there where `add` is true.
  void (*multiply)(
      const void* left, int64_t rows, const void* right, int64_t columns, int64_t depth, void* product, int64_t stride,
      bool add);
};

struct SelectionKernels {
  SelectionProduct products[kDTypes];  // indexed by the DType of the operands

  // Those of values[0 .. count) that are at least `threshold` in magnitude, or NaN: their places and, where wanted,
  // what they are. Returns how many; both have room for `count`. For float and for double.
  int64_t (*above_f32)(const float* values, int64_t count, float threshold, uint32_t* places, float* kept);
  int64_t (*above_f64)(const double* values, int64_t count, double threshold, uint32_t* places, double* kept);

  // products[i] = factor values[i]
  void (*scale_f32)(const float* values, int64_t count, float factor, float* products);
  void (*scale_f64)(const double* values, int64_t count, double factor, double* products);
};

// The kernels of the best instruction set.
const SelectionKernels& selection_kernels();

extern const SelectionKernels selection_kernels_baseline;
#if defined(__x86_64__)
extern const SelectionKernels selection_kernels_avx2;
extern const SelectionKernels selection_kernels_avx512;
#endif

}  // namespace peft_kernels
