// SM3 on sparse deltas, on the CPU: checks, then the kernels of sm3_kernels.h in threads, with the write-back.
//
// Beside the entries it takes a copy of the maxima, N + K numbers: the step starts from the old ones.
#include "../common/sparse_checks.h"
#include "delta.h"
#include "sm3_kernels.h"

#include <torch/csrc/stable/library.h>

#include <optional>

namespace peft_kernels {
namespace {

const Sm3Kernels& choose_kernels() {
#if defined(__x86_64__)
  const Capability capability = allowed_capability();
  if (capability >= Capability::avx512) return sm3_kernels_avx512;
  if (capability == Capability::avx2) return sm3_kernels_avx2;
#endif
  return sm3_kernels_baseline;
}

const Sm3Kernels& sm3_kernels() {
  static const Sm3Kernels& table = choose_kernels();
  return table;
}

void sparse_sm3_(
    Tensor values, Tensor grad, Tensor row_max, Tensor column_max, std::optional<Tensor> exp_avg,
    std::optional<Tensor> weight, Tensor indices, std::optional<Tensor> original, double lr, double beta, double eps,
    double weight_decay) {
  constexpr const char* op = "sparse_sm3_";
  const int64_t count = check_sm3(op, values, grad, row_max, column_max, exp_avg, weight, indices, original, true);
  check_sm3_numbers(op, lr, beta, eps, weight_decay);
  if (count == 0) return;

  const DType dtype = dtype_of(values.scalar_type());
  const int64_t rows = row_max.numel(), columns = column_max.numel(), wide_bytes = accumulation_bytes(dtype);
  const Scratch row_memory(rows * wide_bytes), column_memory(columns * wide_bytes);
  const Sm3Kernels& table = sm3_kernels();
  table.widen[static_cast<int>(dtype)](row_max.const_data_ptr(), rows, row_memory.get());
  table.widen[static_cast<int>(dtype)](column_max.const_data_ptr(), columns, column_memory.get());
  const Sm3State state = {
      .indices = indices.const_data_ptr(),
      .columns = columns,
      .row_before = row_memory.get(),
      .column_before = column_memory.get(),
      .row_max = row_max.data_ptr(),
      .column_max = column_max.data_ptr(),
      .values = values.data_ptr(),
      .grad = grad.const_data_ptr(),
      .exp_avg = exp_avg.has_value() ? exp_avg->data_ptr() : nullptr,
  };
  const Sm3Step numbers = {
      .decay = 1.0 - lr * weight_decay, .kept = beta, .fresh = 1.0 - beta, .eps = eps, .rate = -lr};
  const auto step = table.step[static_cast<int>(dtype)][indices.scalar_type() == ScalarType::Long];
  if (!weight.has_value()) {
    return parallel_chunks(count, [&](int64_t begin, int64_t end) { step(state, begin, end, numbers); });
  }
  const Delta delta(*weight, indices);
  const Tensor base = as_contiguous(*original);
  const void* from = base.const_data_ptr();
  const int64_t bytes = values.element_size();
  parallel_chunks(count, [&](int64_t begin, int64_t end) {
    step(state, begin, end, numbers);
    delta.write_sum(begin, end, at(from, delta.bytes(), begin), at(state.values, bytes, begin), dtype);
  });
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) { m.impl("sparse_sm3_", TORCH_BOX(&peft_kernels::sparse_sm3_)); }
