// The gradient of a slice of channels on the CPU, grad_out[:, indices]^T x: grad_out [M, A], x [M, B] -> [s or A, B].
//
// One of the two operands has few columns, the other one many. The few are transposed, or packed, for all threads once;
// the many are read once, a block of columns at a time, and multiplied with all of the few while they are in cache.
// Bytes: both operands once, of grad_out the lines that hold a channel, and the result. FLOP: 2 M s B. On matrix tiles
// for bfloat16 and, from kFewestOnTiles columns on, for float32, as sums of bfloat16 terms; else on the vectors of
// selection_kernels.h, in float, or double for double.
//
// The way and the chunks of M follow from the shape, so that the bits are the same for any number of threads.
#include "../common/slice_checks.h"
#include "lora_checks.h"
#include "lora_products.h"
#include "sampled_kernels.h"
#include "selection_kernels.h"
#include "slice_tiles.h"
#include "slices.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>

namespace peft_kernels {
namespace {

constexpr int64_t kFewestOnTiles = 64;      // splitting the many into terms takes as long as these do on vectors
constexpr int64_t kVectorRows = 128;        // of M at a time on vectors: a panel of the many stays in the first cache
constexpr int64_t kStripBytes = 512 << 10;  // of the many and their sums: a quarter of a common second cache
// Sums over M are sums of groups, and those of chunks, lest rounding errors grow with M.
constexpr int64_t kGroupRows = 4096;
constexpr int64_t kUnitColumns = 32;  // transposed at a time

Matrix matrix_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0)}; }

// Rows [first, first + rows) of a matrix.
Matrix rows_of(const Matrix& matrix, int64_t first, int64_t rows, int64_t element_bytes) {
  return {at(matrix.data, element_bytes * matrix.row_stride, first), rows, matrix.columns, matrix.row_stride};
}

// Both operands [M, ...], and which of them has few columns.
struct Operands {
  Matrix few, many;
  int64_t element_bytes;
  DType dtype;
};

// Asks for columns [begin, end), along the rows: a walk down a matrix a line or two at a time is nothing that the
// hardware's prefetchers follow.
void fetch(const Matrix& matrix, int64_t begin, int64_t end, int64_t element_bytes) {
  for (int64_t m = 0; m < matrix.rows; ++m) {
    const char* row = at(static_cast<const void*>(matrix.data), element_bytes, m * matrix.row_stride);
    for (int64_t byte = begin * element_bytes; byte < end * element_bytes; byte += 64) {
      __builtin_prefetch(row + byte, 0, 2);
    }
  }
}

// The few columns, transposed and as tiles: what is read often, laid out once.
class Columns {
 public:
  Columns(const SliceTiles& tiles, const Operands& operands)
      : few_(round_up(operands.few.columns, kSliceColumns)),
        steps_(divide_up(operands.few.rows, kSliceDepth)),
        memory_(few_ * steps_ * kSliceDepth * tiles.terms * sizeof(uint16_t)) {
    const Matrix& few = operands.few;
    const SampledKernel& kernel = sampled_kernel_for(operands.dtype);
    const int64_t stride = (steps_ + 1) * kSliceDepth;  // columns start in different sets of the caches
    parallel_units(few.columns, kSliceColumns, few.rows, [&](int64_t begin, int64_t end) {
      const Scratch columns(kSliceColumns * stride * kernel.element_bytes);
      for (int64_t j = begin; j < end; j += kSliceColumns) {
        const int64_t last = std::min(end, j + kSliceColumns);
        kernel.transpose(few, 0, few.rows, j, last, columns.get(), stride);
        tiles.pack(columns.get(), stride, few.rows, j, last, get());
      }
    });
  }
  SliceColumns get() const { return {static_cast<uint16_t*>(memory_.get()), few_, steps_}; }

 private:
  int64_t few_, steps_;
  Scratch memory_;
};

// sums [few, stride], of which the columns of `many` are written. A sum depends on its two columns alone, so that
// strips may follow from the number of threads.
void multiply_on_tiles(const SliceTiles& tiles, const Operands& operands, float* sums, int64_t stride) {
  const Matrix& many = operands.many;
  const Columns columns(tiles, operands);
  const SliceColumns few = columns.get();
  const int64_t workspace_bytes = tiles.chunk_rows * kSliceColumns * tiles.terms * sizeof(uint16_t);
  // The numbers of a chunk in a strip, and its sums, share the second cache.
  const int64_t fitting = kStripBytes / (tiles.chunk_rows * tiles.element_bytes + few.few * sizeof(float));
  const int64_t share = round_up(divide_up(many.columns, torch::stable::get_num_threads()), kSliceColumns);
  const int64_t strip = std::clamp(fitting / kSliceColumns * kSliceColumns, kSliceColumns, share);
  parallel_units(many.columns, strip, many.rows * 8, [&](int64_t begin, int64_t end) {
    const Scratch workspace(workspace_bytes), sum_memory(few.few * strip * sizeof(float));
    float* blocks = static_cast<float*>(sum_memory.get());
    for (int64_t c = begin; c < end; c += strip) {
      const int64_t last = std::min(end, c + strip);
      for (int64_t group = 0; group < many.rows; group += kGroupRows) {
        for (int64_t first = group; first < std::min(many.rows, group + kGroupRows); first += tiles.chunk_rows) {
          tiles.multiply(few, many, first, c, last, first > group, workspace.get(), blocks);
        }
        tiles.store(blocks, few.few, operands.few.columns, last - c, group > 0, sums + c, stride);
      }
    }
  });
}

// The same on vectors.
template <typename acc>
void multiply_on_vectors(const SelectionProduct& kernel, const Operands& operands, acc* sums, int64_t stride) {
  const Matrix &few = operands.few, &many = operands.many;
  const int64_t rows = many.rows, width = kernel.right_width, padded = round_up(few.columns, kernel.left_width);
  const int64_t chunk_bytes = padded * kVectorRows * sizeof(acc);
  const Scratch left((divide_up(rows, kVectorRows)) * chunk_bytes);
  parallel_units(rows, kVectorRows, 4 * padded, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kVectorRows) {
      const Matrix chunk = rows_of(few, first, std::min(kVectorRows, end - first), operands.element_bytes);
      kernel.pack_left(chunk, 0, few.columns, at(left.get(), chunk_bytes, first / kVectorRows));
    }
  });
  const int64_t fitting = kStripBytes / (kVectorRows * operands.element_bytes + padded * sizeof(acc));
  const int64_t share = round_up(divide_up(many.columns, torch::stable::get_num_threads()), width);
  const int64_t strip = std::clamp(fitting / width * width, width, share);
  parallel_units(many.columns, strip, rows * padded, [&](int64_t begin, int64_t end) {
    const Scratch right(kVectorRows * width * sizeof(acc)), sum_memory(padded * strip * sizeof(acc));
    acc* blocks = static_cast<acc*>(sum_memory.get());  // [panels][few][width]
    for (int64_t c = begin; c < end; c += strip) {
      const int64_t last = std::min(end, c + strip);
      for (int64_t group = 0; group < rows; group += kGroupRows) {
        for (int64_t first = group; first < std::min(rows, group + kGroupRows); first += kVectorRows) {
          const int64_t depth = std::min(kVectorRows, rows - first);
          const Matrix chunk = rows_of(many, first, depth, operands.element_bytes);
          fetch(chunk, c, last, operands.element_bytes);
          for (int64_t panel = c; panel < last; panel += width) {
            kernel.pack_right(chunk, panel, std::min(last, panel + width), right.get());
            kernel.multiply(
                at(left.get(), chunk_bytes, first / kVectorRows), padded, right.get(), width, depth,
                blocks + (panel - c) * padded, width, first > group);
          }
        }
        for (int64_t panel = c; panel < last; panel += width) {
          const acc* block = blocks + (panel - c) * padded;
          for (int64_t j = 0; j < few.columns; ++j) {
            acc* to = sums + j * stride + panel;
            for (int64_t i = 0; i < std::min(width, last - panel); ++i) {
              to[i] = group > 0 ? to[i] + block[j * width + i] : block[j * width + i];
            }
          }
        }
      }
    }
  });
}

// out [few, many], or [many, few] when transposed, from sums in another dtype.
void finish(const Operands& operands, const void* sums, int64_t stride, bool transposed, const Tensor& out) {
  const DType wide = operands.dtype == DType::f64 ? DType::f64 : DType::f32;
  const auto cast = slice_kernels().cast[static_cast<int>(wide)][static_cast<int>(dtype_of(out.scalar_type()))];
  const int64_t few = operands.few.columns, many = operands.many.columns;
  const int64_t sum_bytes = accumulation_bytes(wide), bytes = out.element_size();
  void* to = out.data_ptr();
  if (!transposed) {
    parallel_units(few, 1, many, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) cast(at(sums, sum_bytes * stride, j), at(to, bytes * many, j), many);
    });
    return;
  }
  const SampledKernel& kernel = sampled_kernel_for(wide);
  const int64_t length = round_up(few, kernel.lanes);
  const Matrix matrix = {const_cast<void*>(sums), few, many, stride};
  parallel_units(many, kUnitColumns, 4 * few, [&](int64_t begin, int64_t end) {
    const Scratch memory(kUnitColumns * length * sum_bytes);
    for (int64_t c = begin; c < end; c += kUnitColumns) {
      const int64_t columns = std::min(kUnitColumns, end - c);
      kernel.transpose(matrix, 0, few, c, c + columns, memory.get(), length);
      for (int64_t i = 0; i < columns; ++i) {
        cast(at(memory.get(), sum_bytes * length, i), at(to, bytes * few, c + i), few);
      }
    }
  });
}

// The tiles that multiply `few` columns of a dtype, or null where vectors do.
const SliceTiles* slice_tiles_for(DType dtype, int64_t few) {
#if defined(__x86_64__)
  if (sampled_tiles_for(DType::bf16) == nullptr) return nullptr;
  if (dtype == DType::bf16) return &slice_tiles_bf16;
  if (dtype == DType::f32 && few >= kFewestOnTiles) return &slice_tiles_f32;
#endif
  return nullptr;
}

template <typename acc>
void multiply(const Operands& operands, bool transposed, const Tensor& out) {
  const int64_t few = operands.few.columns, many = operands.many.columns;
  if constexpr (std::is_same_v<acc, float>) {
    if (const SliceTiles* tiles = slice_tiles_for(operands.dtype, few)) {
      const bool in_place = !transposed && out.scalar_type() == ScalarType::Float;
      const Scratch memory(in_place ? 0 : few * many * sizeof(float));
      float* sums = static_cast<float*>(in_place ? out.data_ptr() : memory.get());
      multiply_on_tiles(*tiles, operands, sums, many);
      return in_place ? void() : finish(operands, sums, many, transposed, out);
    }
  }
  const SelectionProduct& kernel = selection_kernels().products[static_cast<int>(operands.dtype)];
  const bool in_place = !transposed && out.element_size() == sizeof(acc);
  const Scratch memory(in_place ? 0 : few * many * sizeof(acc));
  acc* sums = static_cast<acc*>(in_place ? out.data_ptr() : memory.get());
  multiply_on_vectors(kernel, operands, sums, many);
  if (!in_place) finish(operands, sums, many, transposed, out);
}

Tensor slice_grad(Tensor grad_out, Tensor x, std::optional<Tensor> indices, ScalarType dtype) {
  constexpr const char* op = "slice_grad";
  const DType activations = activation_dtype(op, "grad_out", grad_out);
  const int64_t channels = check_slice_grad(op, grad_out, x, indices), rows = grad_out.size(0);
  check_grad_dtype(op, dtype, true);
  Tensor out = new_tensor(x, {channels, x.size(1)}, dtype);
  if (out.numel() == 0) return out;
  if (rows == 0) {
    std::memset(out.data_ptr(), 0, out.numel() * out.element_size());
    return out;
  }
  const Scratch gathered(indices.has_value() ? rows * channels * grad_out.element_size() : 0);
  if (indices.has_value()) gather_columns_into(grad_out, *indices, gathered.get());
  const Tensor dy = indices.has_value() ? grad_out : with_unit_columns(grad_out), right = with_unit_columns(x);
  const Matrix left = indices.has_value() ? Matrix{gathered.get(), rows, channels, channels} : matrix_of(dy);
  const bool transposed = left.columns > right.size(1);
  const Operands operands = {
      .few = transposed ? matrix_of(right) : left,
      .many = transposed ? left : matrix_of(right),
      .element_bytes = static_cast<int64_t>(x.element_size()),
      .dtype = activations};
  if (activations == DType::f64) {
    multiply<double>(operands, transposed, out);
  } else {
    multiply<float>(operands, transposed, out);
  }
  return out;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) { m.impl("slice_grad", TORCH_BOX(&peft_kernels::slice_grad)); }
