// The gradient of sparse deltas on CUDA devices, (grad_out^T x)[indices]: grad_out [M, N], x [M, K] -> [entries].
//
// Two ways, and the density of the entries decides. Tiles cost 2 M N K FLOP whatever the density, but for tiles that
// have no entry; dot products cost 2 M FLOP and 2 M elements out of L2 per entry, half of which neighbors in a row
// share. What an element of the product costs on tensor cores against one dot product out of L2 is the density at
// which they meet: with H100's figures, 400 TFLOP/s of mma.sync on 16 bits, a sixth of that for float in three tf32
// products, 4 TB/s of L2, it is 0.9% for 16 bits and 3% for float [calculated, not measured].
//
// The way follows from shape, dtype and number of entries alone, and so do the bits.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/sampled_checks.h"
#include "sampled_product.h"

namespace peft_kernels {
namespace {

constexpr bool kTakesFloat64 = false;

// The density from which tiles are taken, one entry in so many elements.
constexpr int64_t kTilesFromOneIn16Bits = 110, kTilesFromOneInFloat = 33;

bool prefers_dots(const Tensor& grad_out, const Tensor& x, int64_t entries) {
  const bool is_float = x.scalar_type() == ScalarType::Float;
  const int64_t one_in = is_float ? kTilesFromOneInFloat : kTilesFromOneIn16Bits;
  return x.size(0) > 0 && entries < grad_out.size(1) * x.size(1) / one_in;
}

Tensor sampled_product(const Tensor& grad_out, const Tensor& x, const Tensor& indices, ScalarType dtype) {
  constexpr const char* op = "sampled_product";
  check_activations(op, "grad_out", grad_out, kTakesFloat64);
  check_sampled(op, grad_out, x, indices);
  check_grad_dtype(op, dtype, kTakesFloat64);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {indices.size(0)}, dtype);
  if (out.numel() == 0) return out;
  if (prefers_dots(grad_out, x, out.numel())) {
    start_sampled_dots(op, out, grad_out, x, indices);
  } else {
    start_sampled_tiles(op, out, grad_out, x, indices);
  }
  return out;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("sampled_product", TORCH_BOX(&peft_kernels::sampled_product));
}
