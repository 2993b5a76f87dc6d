// Sparse deltas on the CPU: argument checks first, then the kernels of sparse_kernels.h in threads; registration.
#include "../common/sparse_checks.h"
#include "capability.h"
#include "lora_products.h"
#include "parallel.h"
#include "sparse_kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>

namespace peft_kernels {
namespace {

const SparseKernels& choose_sparse_kernels() {
#if defined(__x86_64__)
  const Capability capability = allowed_capability();
  if (capability >= Capability::avx512) return sparse_kernels_avx512;
  if (capability == Capability::avx2) return sparse_kernels_avx2;
#endif
  return sparse_kernels_baseline;
}

const SparseKernels& sparse_kernels() {
  static const SparseKernels& table = choose_sparse_kernels();
  return table;
}

// Element `at` of a contiguous tensor's memory.
char* at(void* data, int64_t element_bytes, int64_t index) { return static_cast<char*>(data) + element_bytes * index; }
const char* at(const void* data, int64_t element_bytes, int64_t index) {
  return static_cast<const char*>(data) + element_bytes * index;
}

// body(begin, end) over chunks of at most kChunk entries, in threads.
template <typename F>
void parallel_chunks(int64_t count, const F& body) {
  constexpr int64_t kWorkPerEntry = 16;
  parallel_units(count, kChunk, kWorkPerEntry, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kChunk) body(first, std::min(end, first + kChunk));
  });
}

// The entries of a weight that a delta changes: checked, and with the kernels for their dtypes.
class Delta {
 public:
  Delta(const Tensor& weight, const Tensor& indices)
      : entries_{weight.data_ptr(), indices.const_data_ptr(), indices.numel()},
        dtype_(dtype_of(weight.scalar_type())),
        bytes_(weight.element_size()),
        wide_(indices.scalar_type() == ScalarType::Long),
        kernels_(sparse_kernels()) {}

  // weight[indices] = elements, for entries [begin, end).
  void write(int64_t begin, int64_t end, const void* elements) const {
    kernels_.scatter[size_index(dtype_)][wide_](entries_, begin, end, elements);
  }

  // weight[indices] = original + values, for a chunk; both pointers at the chunk's first entry.
  void write_sum(int64_t begin, int64_t end, const void* original, const void* values, DType values_dtype) const {
    alignas(64) char sums[kChunk * sizeof(double)];
    add(values_dtype)(original, values, 1.0, end - begin, sums);
    write(begin, end, sums);
  }

  // weight[indices] += scaling values, for a chunk.
  void accumulate(int64_t begin, int64_t end, const void* values, DType values_dtype, double scaling) const {
    alignas(64) char sums[kChunk * sizeof(double)];
    kernels_.gather[size_index(dtype_)][wide_](entries_, begin, end, sums);
    add(values_dtype)(sums, values, scaling, end - begin, sums);
    write(begin, end, sums);
  }

  int64_t bytes() const { return bytes_; }

 private:
  SparseKernels::Add add(DType values_dtype) const {
    return kernels_.add[static_cast<int>(dtype_)][static_cast<int>(values_dtype)];
  }

  Entries entries_;
  DType dtype_;
  int64_t bytes_;
  bool wide_;
  const SparseKernels& kernels_;
};

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

  const double steps = static_cast<double>(step);
  const AdamWStep numbers = {
      .decay = 1.0 - lr * weight_decay,
      .first_weight = 1.0 - beta1,
      .second_kept = beta2,
      .second_weight = 1.0 - beta2,
      .correction = 1.0 / std::sqrt(1.0 - std::pow(beta2, steps)),
      .eps = eps,
      .rate = -lr / (1.0 - std::pow(beta1, steps)),
  };
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
    update(begin, end);
    delta.write_sum(begin, end, at(from, delta.bytes(), begin), at(p, bytes, begin), dtype);
  });
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("scatter_write_", TORCH_BOX(&peft_kernels::scatter_write_));
  m.impl("scatter_accumulate_", TORCH_BOX(&peft_kernels::scatter_accumulate_));
  m.impl("sparse_adamw_", TORCH_BOX(&peft_kernels::sparse_adamw_));
}
