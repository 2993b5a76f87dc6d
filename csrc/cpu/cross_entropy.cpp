// The cross entropy of rows of logits on the CPU, in place: argument checks, then a row at a time in threads.
#include "../common/cross_entropy_checks.h"
#include "capability.h"
#include "cross_entropy_kernels.h"
#include "delta.h"
#include "lora_checks.h"

#include <torch/csrc/stable/library.h>

namespace peft_kernels {
namespace {

constexpr int64_t kWorkPerLogit = 8;

const CrossEntropyKernels& choose_kernels() {
#if defined(__x86_64__)
  const Capability capability = allowed_capability();
  if (capability >= Capability::avx512) return cross_entropy_kernels_avx512;
  if (capability == Capability::avx2) return cross_entropy_kernels_avx2;
#endif
  return cross_entropy_kernels_baseline;
}

void check_below(const char* op, const int64_t* labels, int64_t count, int64_t stride, int64_t vocabulary) {
  for (int64_t m = 0; m < count; ++m) {
    STD_TORCH_CHECK(
        labels[m * stride] < vocabulary, op, ": labels must be less than V, ", vocabulary, ", got ", labels[m * stride],
        " at position ", m);
  }
}

Tensor cross_entropy_rows_(Tensor logits, Tensor labels, double scale) {
  constexpr const char* op = "cross_entropy_rows_";
  check_cross_entropy_rows(op, logits, labels, scale, true);
  const int64_t rows = logits.size(0), columns = logits.size(1), stride = labels.stride(0);
  const int64_t* of_row = static_cast<const int64_t*>(labels.const_data_ptr());
  check_below(op, of_row, rows, stride, columns);
  static const CrossEntropyKernels& table = choose_kernels();
  const DType dtype = dtype_of(logits.scalar_type());
  const auto kernel = table.row[static_cast<int>(dtype)];
  Tensor losses = new_tensor(logits, {rows}, accumulation_type(dtype));
  void *data = logits.data_ptr(), *to = losses.data_ptr();
  const int64_t row_bytes = logits.stride(0) * logits.element_size();
  parallel_units(rows, 1, kWorkPerLogit * columns, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const double loss = kernel(at(data, row_bytes, m), columns, of_row[m * stride], scale);
      if (dtype == DType::f64) {
        static_cast<double*>(to)[m] = loss;
      } else {
        static_cast<float*>(to)[m] = static_cast<float>(loss);
      }
    }
  });
  return losses;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("cross_entropy_rows_", TORCH_BOX(&peft_kernels::cross_entropy_rows_));
}
