// Sparse deltas on the CPU: argument checks first, then the kernels of sparse_kernels.h in threads; registration.
#include "../common/sparse_checks.h"
#include "delta.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

namespace peft_kernels {
namespace {

// Entries that a step of an optimizer goes through before they are written: so few that the lines of the next ones are
// on their way while numbers are calculated.
constexpr int64_t kStep = 64;

void scatter_write_(Tensor weight, Tensor indices, Tensor original, std::optional<Tensor> values) {
  constexpr const char* op = "scatter_write_";
  check_weight(op, weight, weight, true);
  const int64_t count = check_indices(op, indices, weight);
  check_original(op, original, count, weight);
  if (values.has_value()) check_values(op, *values, count, weight, true);
  const Delta delta(weight, indices);
  const Tensor base = as_contiguous(original);
  const void* from = base.const_data_ptr();
  if (!values.has_value()) {
    parallel_chunks(
        count, [&](int64_t begin, int64_t end) { delta.write(begin, end, at(from, delta.bytes(), begin)); });
    return;
  }
  const Tensor changes = as_contiguous(*values);
  const void* change = changes.const_data_ptr();
  const DType dtype = dtype_of(changes.scalar_type());
  const int64_t bytes = changes.element_size();
  parallel_chunks(count, [&](int64_t begin, int64_t end) {
    delta.write_sum(begin, end, at(from, delta.bytes(), begin), at(change, bytes, begin), dtype);
  });
}

void scatter_accumulate_(Tensor weight, Tensor indices, Tensor values, double scaling) {
  constexpr const char* op = "scatter_accumulate_";
  check_weight(op, weight, weight, true);
  const int64_t count = check_indices(op, indices, weight);
  check_values(op, values, count, weight, true);
  const Delta delta(weight, indices);
  const Tensor changes = as_contiguous(values);
  const void* change = changes.const_data_ptr();
  const DType dtype = dtype_of(changes.scalar_type());
  const int64_t bytes = changes.element_size();
  parallel_chunks(count, [&](int64_t begin, int64_t end) {
    delta.accumulate(begin, end, at(change, bytes, begin), dtype, scaling);
  });
}

void sparse_adamw_(
    Tensor values, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, std::optional<Tensor> weight,
    std::optional<Tensor> indices, std::optional<Tensor> original, int64_t step, double lr, double beta1, double beta2,
    double eps, double weight_decay) {
  constexpr const char* op = "sparse_adamw_";
  STD_TORCH_CHECK(values.dim() == 1, op, ": values must be 1-D, got ", described(values));
  check_values(op, values, values.numel(), values, true);
  check_contiguous(op, "values", values);
  check_like_values(op, "grad", grad, values);
  check_like_values(op, "exp_avg", exp_avg, values);
  check_like_values(op, "exp_avg_sq", exp_avg_sq, values);
  const bool written = check_write_back(op, weight, indices, original, values, true);
  check_adamw_numbers(op, step, lr, beta1, beta2, eps, weight_decay);

  const AdamWStep numbers = adamw_step(step, lr, beta1, beta2, eps, weight_decay);
  const DType dtype = dtype_of(values.scalar_type());
  const int64_t bytes = values.element_size(), count = values.numel();
  void *p = values.data_ptr(), *m = exp_avg.data_ptr(), *v = exp_avg_sq.data_ptr();
  const void* g = grad.const_data_ptr();
  const auto adamw = sparse_kernels().adamw[static_cast<int>(dtype)];
  const auto update = [&](int64_t begin, int64_t end) {
    adamw(at(p, bytes, begin), at(g, bytes, begin), at(m, bytes, begin), at(v, bytes, begin), end - begin, numbers);
  };
  if (!written) return parallel_chunks(count, update);
  const Delta delta(*weight, *indices);
  const Tensor base = as_contiguous(*original);
  const void* from = base.const_data_ptr();
  parallel_chunks(count, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kStep) {
      const int64_t last = std::min(end, first + kStep);
      update(first, last);
      delta.write_sum(first, last, at(from, delta.bytes(), first), at(p, bytes, first), dtype);
    }
  });
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("scatter_write_", TORCH_BOX(&peft_kernels::scatter_write_));
  m.impl("scatter_accumulate_", TORCH_BOX(&peft_kernels::scatter_accumulate_));
  m.impl("sparse_adamw_", TORCH_BOX(&peft_kernels::sparse_adamw_));
}
