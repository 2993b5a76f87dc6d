// Rows of kept tokens on the CPU: gathered, normalized, rotated and added back. Argument checks first, then the kernels
// of token_elimination_kernels.h in threads; registration. The product between them is in token_linear.cpp.
//
// All of it is bound by memory, so every operator reads what it reads once and writes its result once. Work is cut by
// shape, never by the number of threads, wherever something is summed.
#include "../common/token_checks.h"
#include "capability.h"
#include "lora_checks.h"
#include "s2ft_kernels.h"
#include "token_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace peft_kernels {
namespace {

int index_of(const Tensor& tensor) { return static_cast<int>(dtype_of(tensor.scalar_type())); }

Tensor gather_rows(Tensor x, Tensor rows) {
  constexpr const char* op = "gather_rows";
  check_activations(op, "x", x, true);
  check_rows(op, rows, x);
  const RowList list(op, rows, x.size(0));
  Tensor out = new_tensor(x, {list.count(), x.size(1)}, x.scalar_type());
  const int64_t columns = x.size(1), column_stride = x.stride(1), bytes = x.element_size();
  const MatrixRows to(out);
  if (column_stride == 1 || columns <= 1) {
    gather_into(MatrixRows(x), list, 0, list.count(), to);
    return out;
  }
  const char* from = static_cast<const char*>(x.const_data_ptr());  // no copy of all of x for some of its rows
  const int64_t row_bytes = x.stride(0) * bytes;
  parallel_units(list.count(), 1, 8 * columns, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      if (list[s] < 0) {
        std::memset(to[s], 0, to.bytes());
      } else {
        copy_strided(to[s], 1, from + list[s] * row_bytes, column_stride, columns, bytes);
      }
    }
  });
  return out;
}

Tensor scatter_add_rows(Tensor residual, Tensor values, Tensor rows) {
  constexpr const char* op = "scatter_add_rows";
  check_activations(op, "residual", residual, true);
  check_row_values(op, residual, values, rows);
  const int64_t total = residual.size(0), columns = residual.size(1);
  const RowList list = RowList::sorted(op, rows, total);
  Tensor out = new_tensor(residual, {total, columns}, residual.scalar_type());
  const RowPlaces places(list, total);
  scatter_add_into(
      MatrixRows(residual), MatrixRows(values), places, 0, 0, total, MatrixRows(out), columns,
      dtype_of(residual.scalar_type()));
  return out;
}

void scatter_add_rows_(Tensor out, Tensor values, Tensor rows) {
  constexpr const char* op = "scatter_add_rows_";
  check_activations(op, "out", out, true);
  check_row_values(op, out, values, rows);
  check_apart(op, "out", out);
  check_lies_apart(op, "out", out, "values", values);
  const RowList list = RowList::sorted(op, rows, out.size(0));
  add_at(out, list, 0, list.count(), MatrixRows(values));
}

// offset + weight [H] in the accumulation dtype of rows of `dtype`.
class Scale {
 public:
  Scale(const Tensor& weight, double offset, DType dtype) : memory_(weight.numel() * accumulation_bytes(dtype)) {
    const Tensor numbers = as_contiguous(weight);
    const DType sums = dtype == DType::f64 ? DType::f64 : DType::f32;
    slice_kernels().cast[index_of(weight)][static_cast<int>(sums)](
        numbers.const_data_ptr(), memory_.get(), weight.numel());
    if (offset == 0) return;
    dtype == DType::f64 ? add<double>(offset, weight.numel()) : add<float>(offset, weight.numel());
  }
  const void* get() const { return memory_.get(); }

 private:
  template <typename acc>
  void add(double offset, int64_t count) {
    acc* numbers = static_cast<acc*>(memory_.get());
    for (int64_t i = 0; i < count; ++i) numbers[i] += static_cast<acc>(offset);
  }

  Scratch memory_;
};

std::tuple<Tensor, Tensor, Tensor> gather_rms_norm(
    Tensor x, std::optional<Tensor> rows, Tensor weight, double eps, double offset) {
  constexpr const char* op = "gather_rms_norm";
  const int64_t count = check_rms_norm(op, x, rows, weight, true), columns = x.size(1);
  const std::optional<RowList> list =
      rows.has_value() ? std::optional(RowList(op, *rows, x.size(0))) : std::optional<RowList>();
  const DType dtype = dtype_of(x.scalar_type());
  Tensor h = new_tensor(x, {count, columns}, x.scalar_type());
  Tensor kept = new_tensor(x, {list.has_value() ? count : 0, columns}, x.scalar_type());
  Tensor rstd = new_tensor(x, {count}, accumulation_type(dtype));
  const MatrixRows from(x), to_kept(kept), to(h);
  char* to_rstd = static_cast<char*>(rstd.data_ptr());
  const int64_t sum_bytes = accumulation_bytes(dtype);
  const Scale scale(weight, offset, dtype);
  const auto rms = token_kernels().rms[static_cast<int>(dtype)];
  const auto normalize = token_kernels().normalize[static_cast<int>(dtype)];
  parallel_units(count, 1, 4 * columns, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const char* row;
      if (!list.has_value()) {
        row = from[s];
      } else {
        const int32_t place = (*list)[s];
        place < 0 ? std::memset(to_kept[s], 0, from.bytes()) : std::memcpy(to_kept[s], from[place], from.bytes());
        row = to_kept[s];
      }
      rms(row, columns, eps, to_rstd + s * sum_bytes);
      normalize(row, to_rstd + s * sum_bytes, scale.get(), to[s], columns);
    }
  });
  return {h, kept, rstd};
}

Tensor rms_norm_rows(Tensor kept, Tensor rstd, Tensor weight, double offset) {
  constexpr const char* op = "rms_norm_rows";
  check_kept(op, kept, rstd, weight, true);
  const int64_t count = kept.size(0), columns = kept.size(1);
  const DType dtype = dtype_of(kept.scalar_type());
  Tensor h = new_tensor(kept, {count, columns}, kept.scalar_type());
  const MatrixRows from(kept), to(h);
  const Tensor factors = as_contiguous(rstd);
  const char* factor = static_cast<const char*>(factors.const_data_ptr());
  const int64_t sum_bytes = accumulation_bytes(dtype);
  const Scale scale(weight, offset, dtype);
  const auto normalize = token_kernels().normalize[static_cast<int>(dtype)];
  parallel_units(count, 1, 2 * columns, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) normalize(from[s], factor + s * sum_bytes, scale.get(), to[s], columns);
  });
  return h;
}

// Partial sums of the gradient by weight, one row of them for each chunk of rows of the result, and their total: chunks
// follow from the shape alone, and so does the order of every addition.
class WeightGradient {
 public:
  WeightGradient(bool wanted, int64_t rows, int64_t columns, DType dtype)
      : chunk_(std::max<int64_t>(kLeastRows, divide_up(rows, kMostChunks))),
        chunks_(wanted ? divide_up(rows, chunk_) : 0),
        columns_(columns),
        dtype_(dtype),
        memory_(chunks_ * row_bytes()) {
    std::memset(memory_.get(), 0, chunks_ * row_bytes());
  }
  int64_t chunk() const { return chunk_; }
  void* of(int64_t row) const {
    return chunks_ == 0 ? nullptr : static_cast<char*>(memory_.get()) + row / chunk_ * row_bytes();
  }
  void total_into(const Tensor& gradient) const {
    dtype_ == DType::f64 ? sum<double>() : sum<float>();
    const DType sums = dtype_ == DType::f64 ? DType::f64 : DType::f32;
    const auto cast = slice_kernels().cast[static_cast<int>(sums)][index_of(gradient)];
    if (chunks_ == 0) {
      std::memset(gradient.data_ptr(), 0, gradient.numel() * gradient.element_size());
    } else {
      cast(memory_.get(), gradient.data_ptr(), columns_);
    }
  }

 private:
  static constexpr int64_t kLeastRows = 32, kMostChunks = 64;

  int64_t row_bytes() const { return columns_ * accumulation_bytes(dtype_); }

  template <typename acc>
  void sum() const {
    acc* total = static_cast<acc*>(memory_.get());
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
      const acc* part = total + chunk * columns_;
      for (int64_t c = 0; c < columns_; ++c) total[c] += part[c];
    }
  }

  int64_t chunk_, chunks_, columns_;
  DType dtype_;
  Scratch memory_;
};

std::tuple<Tensor, Tensor> gather_rms_norm_backward(
    std::optional<Tensor> grad_residual, Tensor grad_h, Tensor kept, Tensor rstd, Tensor weight, double offset,
    std::optional<Tensor> rows, int64_t total, bool weight_grad) {
  constexpr const char* op = "gather_rms_norm_backward";
  check_rms_norm_backward(op, grad_residual, grad_h, kept, rstd, weight, rows, total, true);
  const std::optional<RowList> list =
      rows.has_value() ? std::optional(RowList::sorted(op, *rows, total)) : std::optional<RowList>();
  const int64_t columns = kept.size(1);
  const DType dtype = dtype_of(kept.scalar_type());
  Tensor dx = new_tensor(kept, {total, columns}, kept.scalar_type());
  Tensor dweight = new_tensor(weight, {weight_grad ? columns : 0}, weight.scalar_type());
  std::optional<RowPlaces> places;
  if (list.has_value()) places.emplace(*list, total);
  const MatrixRows grads(grad_h), inputs(kept), to(dx);
  std::optional<MatrixRows> residuals;
  if (grad_residual.has_value()) residuals.emplace(*grad_residual);
  const Tensor factors = as_contiguous(rstd);
  const char* factor = static_cast<const char*>(factors.const_data_ptr());
  const int64_t sum_bytes = accumulation_bytes(dtype);
  const Scale scale(weight, offset, dtype);
  const WeightGradient sums(weight_grad, total, columns, dtype);
  const auto normalize_backward = token_kernels().normalize_backward[static_cast<int>(dtype)];
  const int64_t unit = weight_grad ? sums.chunk() : 1;  // a chunk's sum is one thread's
  parallel_units(total, unit, 8 * columns, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t place = places.has_value() ? (*places)[m] : m;
      const char* residual = residuals.has_value() ? (*residuals)[m] : nullptr;
      if (place >= 0) {
        normalize_backward(
            {.grad_h = grads[place],
             .kept = inputs[place],
             .rstd = factor + place * sum_bytes,
             .scale = scale.get(),
             .residual = residual,
             .dx = to[m],
             .dweight = sums.of(m),
             .count = columns});
      } else if (residual != nullptr) {
        std::memcpy(to[m], residual, to.bytes());
      } else {
        std::memset(to[m], 0, to.bytes());
      }
    }
  });
  if (weight_grad) sums.total_into(dweight);
  return {dx, dweight};
}

Tensor rope_rows(Tensor x, Tensor cos, Tensor sin, std::optional<Tensor> rows, bool inverse) {
  constexpr const char* op = "rope_rows";
  check_rope(op, x, cos, sin, rows, true);
  const std::optional<RowList> list =
      rows.has_value() ? std::optional(RowList(op, *rows, cos.size(0))) : std::optional<RowList>();
  const int64_t tokens = x.size(0), heads = x.size(1), width = x.size(2), rotated = cos.size(1);
  const DType dtype = dtype_of(x.scalar_type());
  const Tensor inputs = x.stride(2) == 1 || width <= 1 ? x : torch::stable::contiguous(x);
  Tensor out = new_tensor(x, {tokens, heads, width}, x.scalar_type());
  const MatrixRows cosines(cos), sines(sin);
  const int64_t bytes = x.element_size();
  const int64_t token_bytes = inputs.stride(0) * bytes, head_bytes = inputs.stride(1) * bytes;
  const char* from = static_cast<const char*>(inputs.const_data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  const DType sums = dtype == DType::f64 ? DType::f64 : DType::f32;
  const auto cast = slice_kernels().cast[index_of(cos)][static_cast<int>(sums)];
  const auto rotate = token_kernels().rotate[static_cast<int>(dtype)];
  parallel_units(tokens, 1, 4 * heads * width, [&](int64_t begin, int64_t end) {
    const Scratch angles(2 * rotated * accumulation_bytes(dtype));
    char* cosine = static_cast<char*>(angles.get());
    char* sine = cosine + rotated * accumulation_bytes(dtype);
    for (int64_t s = begin; s < end; ++s) {
      const int64_t position = list.has_value() ? (*list)[s] : s;
      char* token = to + s * heads * width * bytes;
      if (position < 0) {
        std::memset(token, 0, heads * width * bytes);
        continue;
      }
      cast(cosines[position], cosine, rotated);
      cast(sines[position], sine, rotated);
      for (int64_t head = 0; head < heads; ++head) {
        const char* row = from + s * token_bytes + head * head_bytes;
        char* turned = token + head * width * bytes;
        rotate(row, cosine, sine, turned, rotated / 2, inverse);
        if (rotated < width) std::memcpy(turned + rotated * bytes, row + rotated * bytes, (width - rotated) * bytes);
      }
    }
  });
  return out;
}

const TokenKernels& choose_token_kernels() {
#if defined(__x86_64__)
  const Capability capability = allowed_capability();
  if (capability >= Capability::avx512) return token_elimination_kernels_avx512;
  if (capability == Capability::avx2) return token_elimination_kernels_avx2;
#endif
  return token_elimination_kernels_baseline;
}

}  // namespace

const TokenKernels& token_kernels() {
  static const TokenKernels& table = choose_token_kernels();
  return table;
}

}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("gather_rows", TORCH_BOX(&peft_kernels::gather_rows));
  m.impl("scatter_add_rows", TORCH_BOX(&peft_kernels::scatter_add_rows));
  m.impl("scatter_add_rows_", TORCH_BOX(&peft_kernels::scatter_add_rows_));
  m.impl("gather_rms_norm", TORCH_BOX(&peft_kernels::gather_rms_norm));
  m.impl("rms_norm_rows", TORCH_BOX(&peft_kernels::rms_norm_rows));
  m.impl("gather_rms_norm_backward", TORCH_BOX(&peft_kernels::gather_rms_norm_backward));
  m.impl("rope_rows", TORCH_BOX(&peft_kernels::rope_rows));
}
