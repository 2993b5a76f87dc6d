// LoRA operators on the CPU: argument checks, packing of the factors, threading, registration.
//
// The large product goes to the library GEMM behind torch; everything of rank r is ours. Work is split over rows
// (shrink, accumulate) or over columns and fixed row chunks (factor gradient), never by thread count, so the bits are
// the same for any number of threads. Activations of any dtype are read as they are; only the [r, C] factors and
// [M, r] products are copied, into float.
#include "lora_kernels.h"
#include "../common/describe.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <optional>
#include <string_view>
#include <string>
#include <tuple>

namespace peft_kernels {
namespace {

// The best kernels this processor runs; PEFT_KERNELS_CPU_CAPABILITY=baseline|avx2|avx512|amx lowers the choice.
LoraKernels choose_kernels() {
  const char* wish = std::getenv("PEFT_KERNELS_CPU_CAPABILITY");
  const std::string_view limit = wish == nullptr ? "amx" : wish;
  STD_TORCH_CHECK(
      limit == "baseline" || limit == "avx2" || limit == "avx512" || limit == "amx",
      "PEFT_KERNELS_CPU_CAPABILITY must be baseline, avx2, avx512 or amx, got ", wish == nullptr ? "" : wish);
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && limit == "amx" && amx_bf16_usable()) {
    LoraKernels table = lora_kernels_avx512;
    table.capability = "amx";
    table.products[static_cast<int>(DType::bf16)] = lora_kernels_amx_bf16;
    return table;
  }
  if (avx512 && (limit == "amx" || limit == "avx512")) return lora_kernels_avx512;
  if (avx2 && limit != "baseline") return lora_kernels_avx2;
#endif
  return lora_kernels_baseline;
}

const LoraKernels& kernels() {
  static const LoraKernels table = choose_kernels();
  return table;
}

const SkinnyKernels& products(DType dtype) { return kernels().products[static_cast<int>(dtype)]; }

// --- checks ---

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

DType activation_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16, float16 or float64, got ", described(tensor));
  }
  return DType::f32;
}

void check_matrix(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2, op, ": ", name, " must be 2-D, got ", shape_of(tensor));
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU like the other arguments");
}

void check_shape(const char* op, const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
  check_matrix(op, name, tensor);
  STD_TORCH_CHECK(
      tensor.size(0) == rows && tensor.size(1) == columns, op, ": ", name, " must be [", rows, ", ", columns, "], got ",
      shape_of(tensor));
}

ScalarType accumulation_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

// hidden and grad_hidden: [rows, rank] in the accumulation dtype of the activations.
int64_t check_hidden(const char* op, const Tensor& hidden, int64_t rows, DType dtype) {
  check_matrix(op, "hidden", hidden);
  STD_TORCH_CHECK(
      hidden.size(0) == rows && hidden.size(1) >= 1, op, ": hidden must be [", rows, ", rank >= 1], got ",
      shape_of(hidden));
  STD_TORCH_CHECK(
      hidden.scalar_type() == accumulation_type(dtype), op, ": hidden must be ",
      dtype == DType::f64 ? "float64" : "float32", " for these activations, got ", described(hidden));
  return hidden.size(1);
}

Dropout make_dropout(const char* op, double dropout_p, const std::optional<Tensor>& rng_state) {
  Dropout dropout;
  STD_TORCH_CHECK(
      dropout_p >= 0.0 && dropout_p <= 1.0, op, ": dropout_p must be a probability in [0, 1], got ", dropout_p);
  if (dropout_p == 0.0) return dropout;
  STD_TORCH_CHECK(rng_state.has_value(), op, ": rng_state is needed when dropout_p > 0");
  STD_TORCH_CHECK(
      rng_state->scalar_type() == ScalarType::Long && rng_state->dim() == 1 && rng_state->size(0) == 2 &&
          rng_state->is_cpu(),
      op, ": rng_state must be int64 [2] (seed, offset) on the CPU, got ", described(*rng_state),
      rng_state->is_cpu() ? "" : " elsewhere");
  const Tensor state = rng_state->is_contiguous() ? *rng_state : torch::stable::contiguous(*rng_state);
  const int64_t* words = state.const_data_ptr<int64_t>();
  dropout.active = true;
  dropout.state = {words[0], words[1]};
  dropout.threshold = dropout_threshold(dropout_p);
  dropout.scale = dropout_scale(dropout_p);
  return dropout;
}

// Whether two elements of a matrix share memory: by the order of its strides, exact for everything views produce.
bool overlaps_itself(const Tensor& tensor) {
  const int64_t row = tensor.stride(0), column = tensor.stride(1);
  if (tensor.size(0) <= 1 || tensor.size(1) <= 1) {
    return (tensor.size(0) > 1 && row == 0) || (tensor.size(1) > 1 && column == 0);
  }
  return row >= column ? column < 1 || row <= (tensor.size(1) - 1) * column
                       : row < 1 || column <= (tensor.size(0) - 1) * row;
}

// --- views and packing ---

// The matrix with unit column stride: the tensor itself wherever possible.
Tensor with_unit_columns(const Tensor& tensor) {
  return tensor.stride(1) == 1 || tensor.size(1) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

// Asking first spares a dispatcher call, which a small layer would notice.
Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Matrix matrix_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0)}; }

// Multiply-adds below which a second thread costs more than it brings.
constexpr int64_t kGrain = 1 << 17;

// body(begin, end) over [0, size) in multiples of `unit`, whatever the number of threads.
template <typename F>
void parallel_units(int64_t size, int64_t unit, int64_t work_per_item, const F& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, unit * work_per_item));
  torch::stable::parallel_for(0, divide_up(size, unit), grain, [&](int64_t begin, int64_t end) {
    body(begin * unit, std::min(size, end * unit));
  });
}

// Uninitialised, cache-line aligned scratch.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(std::aligned_alloc(64, round_up(std::max<int64_t>(bytes, 1), 64))) {
    STD_TORCH_CHECK(data_ != nullptr, "peft_kernels: out of memory for ", bytes, " bytes of scratch");
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return data_; }

 private:
  void* data_;
};

// The factor [r, C] in the accumulation dtype; float32 and float64 factors are used where they lie.
Tensor in_accumulation_dtype(const Tensor& factor, DType dtype) {
  const ScalarType target = accumulation_type(dtype);
  return factor.scalar_type() == target ? factor : torch::stable::to(factor, target);
}

// `transposed` reads a [C, r] tensor, the layout of lora_b, as the factor [r, C].
Factor factor_of(const Tensor& factor, double scale, bool transposed = false) {
  const int64_t j = transposed ? 1 : 0, c = 1 - j;
  return {factor.data_ptr(), factor.size(j), factor.size(c), factor.stride(j), factor.stride(c), scale};
}

void check_factor_dtype(const char* op, const char* name, const Tensor& factor, DType dtype) {
  const DType own = activation_dtype(op, name, factor);
  STD_TORCH_CHECK(
      (own == DType::f64) == (dtype == DType::f64), op, ": ", name,
      " must be float64 if and only if the activations are, got ", described(factor));
}

void check_factor(const char* op, const char* name, const Tensor& factor, int64_t columns, DType dtype) {
  check_matrix(op, name, factor);
  STD_TORCH_CHECK(
      factor.size(1) == columns && factor.size(0) >= 1, op, ": ", name, " must be [rank >= 1, ", columns, "], got ",
      shape_of(factor));
  check_factor_dtype(op, name, factor, dtype);
}

// --- the three products on checked arguments ---

void shrink_into(
    const Tensor& out, const Tensor& x, const Tensor& lora_factor, double scaling, DType dtype, const Dropout& dropout,
    bool transposed = false) {
  const SkinnyKernels& kernel = products(dtype);
  const Tensor cast = in_accumulation_dtype(lora_factor, dtype);
  const Factor factor = factor_of(cast, scaling * dropout.scale, transposed);
  const Scratch packed(kernel.shrink_packed_bytes(factor));
  parallel_units(factor.columns, kPanel, 8 * factor.rank, [&](int64_t begin, int64_t end) {
    kernel.shrink_pack(factor, begin, end, packed.get());
  });
  const Matrix matrix = matrix_of(x);
  const Hidden hidden = {out.data_ptr(), factor.rank};
  parallel_units(matrix.rows, kernel.row_unit, factor.columns * factor.rank, [&](int64_t begin, int64_t end) {
    kernel.shrink(matrix, begin, end, factor, packed.get(), hidden, dropout);
  });
}

void accumulate_into(
    const Tensor& out, const Tensor& left, const Tensor& lora_factor, double scaling, DType dtype,
    const Dropout& dropout) {
  const SkinnyKernels& kernel = products(dtype);
  const Tensor cast = in_accumulation_dtype(lora_factor, dtype);
  const Tensor rows = as_contiguous(left);
  const Factor factor = factor_of(cast, scaling * dropout.scale);
  const Hidden hidden = {rows.data_ptr(), factor.rank};
  const Scratch packed(kernel.accumulate_packed_bytes(factor));
  parallel_units(factor.columns, kPanel, 8 * factor.rank, [&](int64_t begin, int64_t end) {
    kernel.accumulate_pack(factor, begin, end, packed.get());
  });
  const Matrix matrix = matrix_of(out);
  parallel_units(matrix.rows, kernel.row_unit, factor.columns * factor.rank, [&](int64_t begin, int64_t end) {
    kernel.accumulate(matrix, begin, end, hidden, factor, packed.get(), dropout);
  });
}

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

void factor_grad_into(
    const Tensor& grad, const Tensor& x, const Tensor& right, double scaling, DType dtype, const Dropout& dropout,
    bool transposed) {
  const SkinnyKernels& kernel = products(dtype);
  const Tensor contiguous_right = as_contiguous(right);
  const Hidden hidden = {contiguous_right.data_ptr(), right.size(1)};
  const Matrix matrix = matrix_of(x);
  const int64_t rank = hidden.rank, groups = divide_up(matrix.columns, kGradColumns);
  const Scratch packed(kernel.grad_packed_bytes(matrix.rows, rank));
  parallel_units(matrix.rows, kPackRows, 8 * rank, [&](int64_t begin, int64_t end) {
    kernel.grad_pack(hidden, matrix.rows, begin, end, packed.get());
  });
  const int64_t split_rows = rows_per_split(matrix.rows, groups);
  const int64_t splits = std::max<int64_t>(1, divide_up(matrix.rows, split_rows));
  const int64_t split_bytes = rank * matrix.columns * static_cast<int64_t>(dtype == DType::f64 ? 8 : 4);
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

// --- operators ---

Tensor new_matrix(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  const std::array<int64_t, 2> sizes = {rows, columns};
  return torch::stable::new_empty(like, sizes, dtype);
}

Tensor dropout_mask(int64_t rows, int64_t columns, double dropout_p, Tensor rng_state) {
  constexpr const char* op = "dropout_mask";
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, op, ": rows and columns must not be negative, got ", rows, ", ", columns);
  const Dropout dropout = make_dropout(op, dropout_p, rng_state);
  Tensor mask = new_matrix(rng_state, rows, columns, ScalarType::Bool);
  bool* keep = static_cast<bool*>(mask.data_ptr());
  const LoraKernels& table = kernels();  // its errors must not arise inside the parallel region
  parallel_units(rows, 1, columns * 8, [&](int64_t begin, int64_t end) {
    table.dropout_mask(keep, columns, begin, end, dropout);
  });
  return mask;
}

Tensor lora_shrink(Tensor x, Tensor factor, double scaling, double dropout_p, std::optional<Tensor> rng_state) {
  constexpr const char* op = "lora_shrink";
  check_matrix(op, "x", x);
  const DType dtype = activation_dtype(op, "x", x);
  check_factor(op, "factor", factor, x.size(1), dtype);
  const Dropout dropout = make_dropout(op, dropout_p, rng_state);
  Tensor hidden = new_matrix(x, x.size(0), factor.size(0), accumulation_type(dtype));
  const Tensor rows = with_unit_columns(x);
  shrink_into(hidden, rows, factor, scaling, dtype, dropout);
  return hidden;
}

void lora_accumulate_(
    Tensor out, Tensor hidden, Tensor factor, double scaling, double dropout_p, std::optional<Tensor> rng_state) {
  constexpr const char* op = "lora_accumulate_";
  check_matrix(op, "out", out);
  const DType dtype = activation_dtype(op, "out", out);
  STD_TORCH_CHECK(
      !overlaps_itself(out), op, ": out is written in place and must not overlap itself, got strides (", out.stride(0),
      ", ", out.stride(1), ")");
  check_factor(op, "factor", factor, out.size(1), dtype);
  const int64_t rank = check_hidden(op, hidden, out.size(0), dtype);
  STD_TORCH_CHECK(rank == factor.size(0), op, ": factor must have hidden's rank ", rank, ", got ", shape_of(factor));
  const Dropout dropout = make_dropout(op, dropout_p, rng_state);
  Tensor rows = with_unit_columns(out);
  accumulate_into(rows, hidden, factor, scaling, dtype, dropout);
  if (rows.data_ptr() != out.data_ptr()) torch::stable::copy_(out, rows);
}

// x matrix (+ bias) by the library GEMM, into a fresh tensor.
Tensor library_matmul(const Tensor& x, const Tensor& matrix, const std::optional<Tensor>& bias) {
  if (!bias.has_value()) return torch::stable::matmul(x, matrix);
  std::array<StableIValue, 3> stack = {
      torch::stable::detail::from(x), torch::stable::detail::from(torch::stable::transpose(matrix, 0, 1)),
      torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor lora_matmul(
    Tensor x, Tensor matrix, std::optional<Tensor> bias, Tensor hidden, Tensor factor, double scaling, double dropout_p,
    std::optional<Tensor> rng_state) {
  constexpr const char* op = "lora_matmul";
  check_matrix(op, "x", x);
  check_matrix(op, "matrix", matrix);
  const DType dtype = activation_dtype(op, "x", x);
  STD_TORCH_CHECK(matrix.size(0) == x.size(1), op, ": matrix must be [", x.size(1), ", C_out], got ", shape_of(matrix));
  STD_TORCH_CHECK(
      matrix.scalar_type() == x.scalar_type(), op, ": matrix must have x's dtype, ", dtype_name(x.scalar_type()),
      ", got ", described(matrix));
  if (bias.has_value()) {
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == matrix.size(1) && bias->scalar_type() == x.scalar_type() && bias->is_cpu(),
        op, ": bias must be [", matrix.size(1), "] in x's dtype, ", dtype_name(x.scalar_type()), ", got ",
        described(*bias));
  }
  check_factor(op, "factor", factor, matrix.size(1), dtype);
  const int64_t rank = check_hidden(op, hidden, x.size(0), dtype);
  STD_TORCH_CHECK(rank == factor.size(0), op, ": factor must have hidden's rank ", rank, ", got ", shape_of(factor));
  const Dropout dropout = make_dropout(op, dropout_p, rng_state);
  const Tensor out = library_matmul(x, matrix, bias);
  // Autocast would change the dtype under us; lora_linear casts before it calls.
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type(), op, ": the library GEMM changed the dtype; is autocast on?");
  accumulate_into(out, hidden, factor, scaling, dtype, dropout);
  return out;
}

Tensor lora_factor_grad(
    Tensor x, Tensor hidden, double scaling, double dropout_p, std::optional<Tensor> rng_state, ScalarType dtype,
    bool transposed) {
  constexpr const char* op = "lora_factor_grad";
  check_matrix(op, "x", x);
  const DType activations = activation_dtype(op, "x", x);
  const int64_t rank = check_hidden(op, hidden, x.size(0), activations);
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
          dtype == ScalarType::Double,
      op, ": dtype must be float32, bfloat16, float16 or float64, got ", dtype_name(dtype));
  const Dropout dropout = make_dropout(op, dropout_p, rng_state);
  const int64_t columns = x.size(1);
  Tensor grad = transposed ? new_matrix(x, columns, rank, dtype) : new_matrix(x, rank, columns, dtype);
  const Tensor rows = with_unit_columns(x);
  factor_grad_into(grad, rows, hidden, scaling, activations, dropout, transposed);
  return grad;
}

std::tuple<Tensor, Tensor> lora_grad_b(Tensor grad_out, Tensor hidden, Tensor lora_b, double scaling) {
  constexpr const char* op = "lora_grad_b";
  check_matrix(op, "grad_out", grad_out);
  const DType dtype = activation_dtype(op, "grad_out", grad_out);
  const int64_t rank = check_hidden(op, hidden, grad_out.size(0), dtype);
  check_shape(op, "lora_b", lora_b, grad_out.size(1), rank);
  const Tensor rows = with_unit_columns(grad_out);
  check_factor_dtype(op, "lora_b", lora_b, dtype);
  Tensor grad_hidden = new_matrix(grad_out, grad_out.size(0), rank, accumulation_type(dtype));
  Tensor grad_b = new_matrix(grad_out, grad_out.size(1), rank, lora_b.scalar_type());
  // Both products read dy; on the CPU the second read comes from the cache, so each keeps its own best split.
  shrink_into(grad_hidden, rows, lora_b, scaling, dtype, Dropout(), true);
  factor_grad_into(grad_b, rows, hidden, scaling, dtype, Dropout(), true);
  return {grad_hidden, grad_b};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("dropout_mask", TORCH_BOX(&peft_kernels::dropout_mask));
  m.impl("lora_shrink", TORCH_BOX(&peft_kernels::lora_shrink));
  m.impl("lora_accumulate_", TORCH_BOX(&peft_kernels::lora_accumulate_));
  m.impl("lora_matmul", TORCH_BOX(&peft_kernels::lora_matmul));
  m.impl("lora_factor_grad", TORCH_BOX(&peft_kernels::lora_factor_grad));
  m.impl("lora_grad_b", TORCH_BOX(&peft_kernels::lora_grad_b));
}
