// Slices of channels on the CPU: argument checks first, then copies and the kernels of s2ft_kernels.h in threads;
// registration. Their gradient is in slice_grad.cpp, the exchange of one for another in slice_exchange.cpp.
#include "../common/slice_checks.h"
#include "lora_checks.h"
#include "slices.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace peft_kernels {
namespace {

constexpr int64_t kWorkPerActivation = 16;  // of an exp and what goes with it

Tensor gather_columns(Tensor x, Tensor indices) {
  constexpr const char* op = "gather_columns";
  check_activations(op, "x", x, true);
  const int64_t count = check_channels(op, indices, x.size(1), x);
  Tensor out = new_tensor(x, {x.size(0), count}, x.scalar_type());
  gather_columns_into(x, indices, out.data_ptr());
  return out;
}

void slice_write_(Tensor weight, Tensor indices, Tensor values, int64_t dim) {
  check_slice("slice_write_", "values", weight, indices, values, dim, true);
  const Slice slice(weight, indices, dim);
  const Tensor rows = as_contiguous(values);
  const void* from = rows.const_data_ptr();
  const DType dtype = dtype_of(rows.scalar_type());
  const int64_t bytes = rows.element_size();
  parallel_chunks(
      rows.numel(), [&](int64_t begin, int64_t end) { slice.write(begin, end, at(from, bytes, begin), dtype); });
}

void slice_adamw_(
    Tensor trainable, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, std::optional<Tensor> weight,
    std::optional<Tensor> indices, int64_t dim, int64_t step, double lr, double beta1, double beta2, double eps,
    double weight_decay) {
  constexpr const char* op = "slice_adamw_";
  const bool written = check_slice_adamw(op, trainable, grad, exp_avg, exp_avg_sq, weight, indices, dim, true);
  check_adamw_numbers(op, step, lr, beta1, beta2, eps, weight_decay);
  const AdamWStep numbers = adamw_step(step, lr, beta1, beta2, eps, weight_decay);
  const DType dtype = dtype_of(trainable.scalar_type());
  const int64_t bytes = trainable.element_size(), count = trainable.numel();
  void *p = trainable.data_ptr(), *m = exp_avg.data_ptr(), *v = exp_avg_sq.data_ptr();
  const void* g = grad.const_data_ptr();
  const auto adamw = sparse_kernels().adamw[static_cast<int>(dtype)];
  const auto update = [&](int64_t begin, int64_t end) {
    adamw(at(p, bytes, begin), at(g, bytes, begin), at(m, bytes, begin), at(v, bytes, begin), end - begin, numbers);
  };
  if (!written) return parallel_chunks(count, update);
  const Slice slice(*weight, *indices, dim);
  parallel_chunks(count, [&](int64_t begin, int64_t end) {
    update(begin, end);
    slice.write(begin, end, at(p, bytes, begin), dtype);
  });
}

// A matrix [M, K] as rows of elements.
class Rows {
 public:
  explicit Rows(const Tensor& tensor)
      : tensor_(with_unit_columns(tensor)),
        data_(tensor_.data_ptr()),
        bytes_(tensor_.stride(0) * tensor_.element_size()) {}
  char* operator[](int64_t m) const { return at(data_, bytes_, m); }

 private:
  Tensor tensor_;
  void* data_;
  int64_t bytes_;  // from row to row
};

std::tuple<Tensor, Tensor> swiglu(Tensor gate, Tensor up, Tensor indices) {
  constexpr const char* op = "swiglu";
  const DType dtype = activation_dtype(op, "gate", gate);
  check_like_gate(op, "up", up, gate);
  const int64_t rows = gate.size(0), columns = gate.size(1);
  const int64_t count = check_channels(op, indices, columns, gate);
  Tensor h = new_tensor(gate, {rows, columns}, gate.scalar_type());
  Tensor slice = new_tensor(gate, {rows, count}, gate.scalar_type());
  const Rows gates(gate), ups(up), to(h), kept(slice);
  const int64_t* channels = channels_of(indices);
  const auto kernel = slice_kernels().swiglu[static_cast<int>(dtype)];
  with_bits(gate.element_size(), [&](auto bits) {
    using Bits = decltype(bits);
    parallel_units(rows, 1, kWorkPerActivation * columns, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        kernel(gates[m], ups[m], to[m], columns);
        gather_row(reinterpret_cast<const Bits*>(to[m]), 1, channels, count, reinterpret_cast<Bits*>(kept[m]));
      }
    });
  });
  return {h, slice};
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor grad_h, Tensor gate, Tensor up) {
  constexpr const char* op = "swiglu_backward";
  const DType dtype = activation_dtype(op, "gate", gate);
  check_like_gate(op, "up", up, gate);
  check_like_gate(op, "grad_h", grad_h, gate);
  const int64_t rows = gate.size(0), columns = gate.size(1);
  Tensor grad_gate = new_tensor(gate, {rows, columns}, gate.scalar_type());
  Tensor grad_up = new_tensor(gate, {rows, columns}, gate.scalar_type());
  const Rows grads(grad_h), gates(gate), ups(up), to_gate(grad_gate), to_up(grad_up);
  const auto kernel = slice_kernels().swiglu_backward[static_cast<int>(dtype)];
  parallel_units(rows, 1, 2 * kWorkPerActivation * columns, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) kernel(grads[m], gates[m], ups[m], to_gate[m], to_up[m], columns);
  });
  return {grad_gate, grad_up};
}

const SliceKernels& choose_slice_kernels() {
#if defined(__x86_64__)
  const Capability capability = allowed_capability();
  if (capability >= Capability::avx512) return s2ft_kernels_avx512;
  if (capability == Capability::avx2) return s2ft_kernels_avx2;
#endif
  return s2ft_kernels_baseline;
}

}  // namespace

const SliceKernels& slice_kernels() {
  static const SliceKernels& table = choose_slice_kernels();
  return table;
}

}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("gather_columns", TORCH_BOX(&peft_kernels::gather_columns));
  m.impl("slice_write_", TORCH_BOX(&peft_kernels::slice_write_));
  m.impl("slice_adamw_", TORCH_BOX(&peft_kernels::slice_adamw_));
  m.impl("swiglu", TORCH_BOX(&peft_kernels::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&peft_kernels::swiglu_backward));
}
