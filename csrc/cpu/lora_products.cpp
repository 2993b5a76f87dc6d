// Casts, packing and threads around the raw kernels of lora_kernels.h and gemm_amx.h, and the library GEMM.
//
// Everything of rank r is ours. The large product is too where gemm_amx.h has a kernel for it, which then carries the
// low-rank one along; elsewhere it goes to the library GEMM behind torch, and the low-rank one is added to its result.
// Sums are split over rows or columns by rules that know only the shape, so that our bits are the same for any number
// of threads. Activations of any dtype are read as they are; only the [r, C] factors and [M, r] products are copied,
// into float, and the rows that the large product is working on, into tiles.
#include "lora_products.h"

#include "../common/library_gemm.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <initializer_list>

#include "capability.h"
#include "gemm_amx.h"
#include "parallel.h"

namespace peft_kernels {
namespace {

LoraKernels choose_kernels() {
  const Capability capability = allowed_capability();
#if defined(__x86_64__)
  if (capability == Capability::amx && amx_bf16_usable()) {
    LoraKernels table = lora_kernels_avx512;
    table.capability = "amx";
    table.products[static_cast<int>(DType::bf16)] = lora_kernels_amx_bf16;
    table.gemms[static_cast<int>(DType::bf16)] = &gemm_amx_bf16;
    table.gemms[static_cast<int>(DType::f32)] = &gemm_amx_f32;
    return table;
  }
  if (capability >= Capability::avx512) return lora_kernels_avx512;
  if (capability == Capability::avx2) return lora_kernels_avx2;
#endif
  return lora_kernels_baseline;
}

const SkinnyKernels& products(DType dtype) { return kernels().products[static_cast<int>(dtype)]; }

Matrix matrix_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0)}; }

// The factor [r, C] in the accumulation dtype; float32 and float64 factors are used where they lie.
Tensor in_accumulation_dtype(const Tensor& factor, DType dtype) {
  const ScalarType target = accumulation_type(dtype);
  return factor.scalar_type() == target ? factor : torch::stable::to(factor, target);
}

// `transposed` reads a [C, r] tensor, the layout of lora_b, as the factor [r, C].
Factor factor_of(const Tensor& factor, double scale, bool transposed) {
  const int64_t j = transposed ? 1 : 0, c = 1 - j;
  return {factor.data_ptr(), factor.size(j), factor.size(c), factor.stride(j), factor.stride(c), scale};
}

// A factor, cast and laid out as one of the products wants it.
class PackedFactor {
 public:
  PackedFactor(
      const Tensor& lora_factor, double scale, DType dtype, bool transposed, int64_t (*bytes)(const Factor&),
      void (*pack)(const Factor&, int64_t, int64_t, void*))
      : cast_(in_accumulation_dtype(lora_factor, dtype)),
        factor_(factor_of(cast_, scale, transposed)),
        packed_(bytes(factor_)) {
    parallel_units(factor_.columns, kPanel, 8 * factor_.rank, [&](int64_t begin, int64_t end) {
      pack(factor_, begin, end, packed_.get());
    });
  }
  const Factor& factor() const { return factor_; }
  const void* get() const { return packed_.get(); }

 private:
  Tensor cast_;
  Factor factor_;
  Scratch packed_;
};

// A narrow matrix has few groups of columns, so its rows are split too, by a rule that knows only the shape.
int64_t rows_per_split(int64_t rows, int64_t groups) {
  constexpr int64_t kTasks = 16, kMinimumRows = 256;
  const int64_t wanted = divide_up(kTasks, std::max<int64_t>(1, groups));
  const int64_t splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, rows / kMinimumRows));
  return std::max<int64_t>(kPackRows, round_up(divide_up(rows, splits), kPackRows));
}

// grad = scale * (sum of the partials, in order), cast and, for lora_b, transposed; partials are [splits][r][C].
template <typename Target, typename acc>
void reduce_partials(
    Target* grad, const acc* partials, int64_t splits, int64_t rank, int64_t columns, acc scale, bool transposed) {
  parallel_units(columns, kPanel, 8 * rank * splits, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += kPanel) {
      const int64_t width = std::min(kPanel, end - c);
      for (int64_t j = 0; j < rank; ++j) {
        acc sum[kPanel];
        std::copy_n(partials + j * columns + c, width, sum);
        for (int64_t split = 1; split < splits; ++split) {
          const acc* partial = partials + (split * rank + j) * columns + c;
          for (int64_t i = 0; i < width; ++i) sum[i] += partial[i];
        }
        const int64_t stride = transposed ? rank : 1;
        Target* to = transposed ? grad + c * rank + j : grad + j * columns + c;
        for (int64_t i = 0; i < width; ++i) to[i * stride] = static_cast<Target>(sum[i] * scale);
      }
    }
  });
}

template <typename acc>
void reduce_into(
    const Tensor& grad, const void* partials, int64_t splits, int64_t rank, int64_t columns, double scale,
    bool transposed) {
  const acc* sums = static_cast<const acc*>(partials);
  const acc factor = static_cast<acc>(scale);
  void* out = grad.data_ptr();
  switch (grad.scalar_type()) {
    case ScalarType::BFloat16:
      return reduce_partials(static_cast<c10::BFloat16*>(out), sums, splits, rank, columns, factor, transposed);
    case ScalarType::Half:
      return reduce_partials(static_cast<c10::Half*>(out), sums, splits, rank, columns, factor, transposed);
    case ScalarType::Double:
      return reduce_partials(static_cast<double*>(out), sums, splits, rank, columns, factor, transposed);
    default:
      return reduce_partials(static_cast<float*>(out), sums, splits, rank, columns, factor, transposed);
  }
}

// The kernel that beats the library GEMM on this product, or null. It reads the matrix once per chunk of rows and lays
// it out anew, which few rows do not repay.
const GemmKernel* own_gemm(const Tensor& x, const Tensor& matrix, const std::optional<Tensor>& bias, DType dtype) {
  constexpr int64_t kLeastRows = 64;
  const bool fits = x.size(0) >= kLeastRows && (x.stride(1) == 1 || x.size(1) <= 1) &&
                    (matrix.stride(0) == 1 || matrix.stride(1) == 1) &&
                    (!bias.has_value() || bias->stride(0) == 1 || bias->size(0) <= 1);
  return fits ? kernels().gemms[static_cast<int>(dtype)] : nullptr;
}

// Rows of a chunk of our own product: as many as share one layout of the right operand, fewer where their tiles would
// take more than kLeftBytes.
int64_t gemm_row_chunk(const GemmKernel& kernel, const GemmArguments& arguments) {
  constexpr int64_t kMost = 512, kLeast = 64, kLeftBytes = int64_t{24} << 20;
  const int64_t bytes = kernel.left_bytes(arguments, kGemmRows);
  const int64_t most = std::clamp(kLeftBytes / bytes * kGemmRows, kLeast, kMost), rows = arguments.out.rows;
  return round_up(divide_up(rows, larger(1, divide_up(rows, most))), kGemmRows);  // cut evenly
}

// x matrix + bias + D * (hidden factor) by a kernel of ours.
void tiled_matmul(const GemmKernel& kernel, const GemmArguments& arguments) {
  const int64_t rows = arguments.out.rows, columns = arguments.out.columns, depth = arguments.x.columns;
  const int64_t chunk = gemm_row_chunk(kernel, arguments), panels = divide_up(columns, kGemmColumns);
  const Scratch tiles(kernel.left_bytes(arguments, std::min(rows, chunk)));
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t last = std::min(rows, first + chunk);
    parallel_units(last - first, kGemmRows, depth, [&](int64_t begin, int64_t end) {
      kernel.lay_out(arguments, first, first + begin, first + end, tiles.get());
    });
    // A thread finds the rows it has laid out in its own cache, so rows are split first, into as many parts as repay
    // laying out a panel of the matrix again.
    constexpr int64_t kPartRows = 256;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t wanted = std::clamp<int64_t>((last - first) / kPartRows, 1, threads);
    const int64_t part = round_up(divide_up(last - first, wanted), kGemmRows), parts = divide_up(last - first, part);
    parallel_units(parts * panels, 1, part * kGemmColumns * depth, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t of_part = std::min(end, (begin / panels + 1) * panels) - begin, panel = begin % panels;
        const int64_t from = first + begin / panels * part, to = std::min(last, from + part);
        const Scratch workspace(kernel.workspace_bytes(arguments, to - from));
        kernel.multiply(
            arguments, from, to, panel * kGemmColumns, std::min(columns, (panel + of_part) * kGemmColumns),
            static_cast<char*>(tiles.get()) + kernel.left_bytes(arguments, from - first), workspace.get());
        begin += of_part;
      }
    });
  }
}

}  // namespace

const LoraKernels& kernels() {
  static const LoraKernels table = choose_kernels();
  return table;
}

Tensor with_unit_columns(const Tensor& tensor) {
  return tensor.stride(1) == 1 || tensor.size(1) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  auto number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const int64_t dimensions = static_cast<int64_t>(sizes.size());
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_aten_new_empty(like.get(), sizes.begin(), dimensions, &number, nullptr, nullptr, 0, nullptr, &handle));
  return Tensor(handle);
}

Drawn::Drawn(const Dropout& dropout, int64_t rows, int64_t columns)
    : words_(dropout.active && dropout.keep == nullptr ? rows * divide_up(columns, kPanel) * 8 : 0), dropout_(dropout) {
  if (!dropout.active || dropout.keep != nullptr) return;
  uint64_t* words = static_cast<uint64_t*>(words_.get());
  const LoraKernels& table = kernels();
  parallel_units(
      rows, 1, columns * 8, [&](int64_t begin, int64_t end) { table.keep_words(words, columns, begin, end, dropout); });
  dropout_.keep = words;
  dropout_.keep_stride = divide_up(columns, kPanel);
}

void shrink_into(
    const Hidden& hidden, const Tensor& x, const Tensor& lora_factor, double scaling, DType dtype,
    const Dropout& dropout, bool transposed) {
  const SkinnyKernels& kernel = products(dtype);
  const PackedFactor packed(
      lora_factor, scaling * dropout.scale, dtype, transposed, kernel.shrink_packed_bytes, kernel.shrink_pack);
  const Factor& factor = packed.factor();
  const Matrix matrix = matrix_of(x);
  parallel_units(matrix.rows, kernel.row_unit, factor.columns * factor.rank, [&](int64_t begin, int64_t end) {
    kernel.shrink(matrix, begin, end, factor, packed.get(), hidden, dropout);
  });
}

void accumulate_into(
    const Tensor& out, const Hidden& hidden, const Tensor& lora_factor, double scaling, DType dtype,
    const Dropout& dropout, bool transposed) {
  const SkinnyKernels& kernel = products(dtype);
  const PackedFactor packed(
      lora_factor, scaling * dropout.scale, dtype, transposed, kernel.accumulate_packed_bytes, kernel.accumulate_pack);
  const Factor& factor = packed.factor();
  const Matrix matrix = matrix_of(out);
  parallel_units(matrix.rows, kernel.row_unit, factor.columns * factor.rank, [&](int64_t begin, int64_t end) {
    kernel.accumulate(matrix, begin, end, hidden, factor, packed.get(), dropout);
  });
}

void factor_grad_into(
    const Tensor& grad, const Tensor& x, const Hidden& hidden, double scaling, DType dtype, const Dropout& dropout,
    bool transposed) {
  const SkinnyKernels& kernel = products(dtype);
  const Matrix matrix = matrix_of(x);
  const int64_t rank = hidden.rank, groups = divide_up(matrix.columns, kGradColumns);
  const Scratch packed(kernel.grad_packed_bytes(matrix.rows, rank));
  parallel_units(matrix.rows, kPackRows, 8 * rank, [&](int64_t begin, int64_t end) {
    kernel.grad_pack(hidden, matrix.rows, begin, end, packed.get());
  });
  const int64_t split_rows = rows_per_split(matrix.rows, groups);
  const int64_t splits = std::max<int64_t>(1, divide_up(matrix.rows, split_rows));
  const int64_t split_bytes = rank * matrix.columns * accumulation_bytes(dtype);
  const Scratch partials(splits * split_bytes);
  parallel_units(groups * splits, 1, split_rows * kGradColumns * rank, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task / groups, first = split * split_rows, column = task % groups * kGradColumns;
      kernel.grad(
          matrix, first, std::min(matrix.rows, first + split_rows), column,
          std::min(matrix.columns, column + kGradColumns), rank, packed.get(),
          static_cast<char*>(partials.get()) + split * split_bytes, dropout);
    }
  });
  const double scale = scaling * dropout.scale;
  if (dtype == DType::f64) {
    reduce_into<double>(grad, partials.get(), splits, rank, matrix.columns, scale, transposed);
  } else {
    reduce_into<float>(grad, partials.get(), splits, rank, matrix.columns, scale, transposed);
  }
}

Tensor matmul(
    const Tensor& x, const Tensor& matrix, const std::optional<Tensor>& bias, const Hidden& hidden,
    const Tensor& lora_factor, double scaling, DType dtype, const Dropout& dropout, bool transposed) {
  if (const GemmKernel* kernel = own_gemm(x, matrix, bias, dtype)) {
    const int64_t input = transposed ? 1 : 0, output = 1 - input;
    const Tensor out = new_tensor(x, {x.size(0), matrix.size(output)}, x.scalar_type());
    const Tensor cast = in_accumulation_dtype(lora_factor, dtype);
    const Drawn drawn(dropout, out.size(0), out.size(1));
    tiled_matmul(
        *kernel, {.x = matrix_of(x),
                  .matrix = matrix.data_ptr(),
                  .depth_stride = matrix.stride(input),
                  .column_stride = matrix.stride(output),
                  .bias = bias.has_value() ? bias->data_ptr() : nullptr,
                  .hidden = hidden,
                  .factor = factor_of(cast, scaling * dropout.scale, transposed),
                  .keep = drawn.dropout().keep,
                  .keep_stride = drawn.dropout().keep_stride,
                  .out = matrix_of(out)});
    return out;
  }
  const Tensor out = library_matmul(x, matrix, bias, transposed);
  accumulate_into(out, hidden, lora_factor, scaling, dtype, dropout, transposed);
  return out;
}

}  // namespace peft_kernels
