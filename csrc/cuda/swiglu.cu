// h = silu(gate) * up [M, K], with the slice h[:, indices] [M, s] from the same registers, and both gradients. Formulas
// in peft_kernels/reference/s2ft.py.
//
// Bytes, e to an element: forward reads 2 e M K and writes e M (K + s), the channels, 8 s, come from L1; backward reads
// 3 e M K and writes 2 e M K. Per element an exponential, a reciprocal and some ten FLOP beside it: memory bounds both.
// In 16-bit types it takes the fast exponential and reciprocal for that, whose few units in float's last place do not
// show there.
//
// Which of its columns are channels a thread looks up once, for all its rows.
#include <cuda_runtime.h>
#include <launch.cuh>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <tuple>

#include "../common/slice_checks.h"
#include "indices.h"
#include "row_chunks.h"

namespace peft_kernels {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr bool kTakesFloat64 = false;
constexpr int kForwardRows = 4, kBackwardRows = 2;

// sigmoid(gate) and 1 - sigmoid(gate), each to its last digits: exp of -|gate| can only become small.
struct Sigmoid {
  float value, rest;
};

template <typename Element>
__device__ __forceinline__ Sigmoid sigmoid_of(float gate) {
  constexpr bool kExact = sizeof(Element) == 4;
  const float magnitude = fabsf(gate);
  const float small = kExact ? expf(-magnitude) : __expf(-magnitude);
  const float large = kExact ? 1.0f / (1.0f + small) : __fdividef(1.0f, 1.0f + small);
  return gate > 0.0f ? Sigmoid{large, small * large} : Sigmoid{small * large, large};
}

// --- forward ---

struct ForwardArguments {
  RowsView gate, up, h;
  void* slice;  // [M, s], contiguous
  IndicesView indices;
  int64_t channels;  // s
  Size size;
};

// Bit c: whether column c of a chunk is a channel; `first` is the place of the first one among the channels.
struct Kept {
  int64_t first;
  uint32_t columns;
};

template <typename Element>
__device__ __forceinline__ Kept kept_of(const ForwardArguments& a, int64_t column) {
  Kept kept = {lower_bound(a.indices, 0, a.channels, column), 0};
  for (int64_t at = kept.first; at < a.channels; ++at) {
    const int64_t ahead = a.indices[at] - column;
    if (ahead >= kChunk<Element>) break;
    kept.columns |= 1u << ahead;
  }
  return kept;
}

template <typename Element>
__global__ void __launch_bounds__(kChunkThreads) swiglu_kernel(const __grid_constant__ ForwardArguments a) {
  const Place place = place_of_thread<Element, kForwardRows>(a.size);
  if (place.count == 0) return;
  Chunk<Element> gate[kForwardRows], up[kForwardRows];
  load_rows(a.gate, place, a.size.columns, gate);
  load_rows(a.up, place, a.size.columns, up);
  const Kept kept = kept_of<Element>(a, place.column);
#pragma unroll
  for (int i = 0; i < kForwardRows; ++i) {
    if (i >= place.count) return;
    Chunk<Element> h = {};
#pragma unroll
    for (int c = 0; c < kChunk<Element>; ++c) {
      const float g = gate[i][c];
      h.set(c, g * sigmoid_of<Element>(g).value * up[i][c]);
    }
    store_row(a.h, place.row + i, place.column, a.size.columns, h);
    auto* slice = static_cast<typename Chunk<Element>::Bits*>(a.slice) + (place.row + i) * a.channels + kept.first;
#pragma unroll
    for (int c = 0; c < kChunk<Element>; ++c) {
      if (kept.columns >> c & 1u) *slice++ = h.bits(c);
    }
  }
}

std::tuple<Tensor, Tensor> swiglu(const Tensor& gate, const Tensor& up, const Tensor& indices) {
  constexpr const char* op = "swiglu";
  check_activations(op, "gate", gate, kTakesFloat64);
  check_like_gate(op, "up", up, gate);
  const int64_t channels = check_channels(op, indices, gate.size(1), gate);
  const DeviceGuard guard(gate.get_device_index());
  Tensor h = torch::stable::new_empty(gate, {gate.size(0), gate.size(1)}, gate.scalar_type());
  Tensor slice = torch::stable::new_empty(gate, {gate.size(0), channels}, gate.scalar_type());
  if (h.numel() == 0) return {h, slice};
  const ForwardArguments a = {rows_view(gate),
                              rows_view(up),
                              rows_view(h, h.mutable_data_ptr()),
                              slice.mutable_data_ptr(),
                              indices_view(indices),
                              channels,
                              size_of(gate)};
  with_element_type(dtype_of(gate.scalar_type()), [&](auto element) {
    using Element = decltype(element);
    launch(
        op, grid_of<Element, kForwardRows>(a.size), swiglu_kernel<Element>, a,
        {{"gate", gate}, {"up", up}, {"indices", indices}, {"h", h, Access::write}, {"slice", slice, Access::write}});
  });
  return {h, slice};
}

// --- backward ---

struct BackwardArguments {
  RowsView grad_h, gate, up, grad_gate, grad_up;
  Size size;
};

template <typename Element>
__global__ void __launch_bounds__(kChunkThreads) swiglu_backward_kernel(const __grid_constant__ BackwardArguments a) {
  const Place place = place_of_thread<Element, kBackwardRows>(a.size);
  if (place.count == 0) return;
  Chunk<Element> grad_h[kBackwardRows], gate[kBackwardRows], up[kBackwardRows];
  load_rows(a.grad_h, place, a.size.columns, grad_h);
  load_rows(a.gate, place, a.size.columns, gate);
  load_rows(a.up, place, a.size.columns, up);
#pragma unroll
  for (int i = 0; i < kBackwardRows; ++i) {
    if (i >= place.count) return;
    Chunk<Element> grad_gate = {}, grad_up = {};
#pragma unroll
    for (int c = 0; c < kChunk<Element>; ++c) {
      const float g = gate[i][c], dh = grad_h[i][c];
      const Sigmoid s = sigmoid_of<Element>(g);
      const float slope = s.value * (1.0f + g * s.rest);
      grad_gate.set(c, dh * up[i][c] * slope);
      grad_up.set(c, dh * (g * s.value));
    }
    store_row(a.grad_gate, place.row + i, place.column, a.size.columns, grad_gate);
    store_row(a.grad_up, place.row + i, place.column, a.size.columns, grad_up);
  }
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad_h, const Tensor& gate, const Tensor& up) {
  constexpr const char* op = "swiglu_backward";
  check_activations(op, "gate", gate, kTakesFloat64);
  check_like_gate(op, "up", up, gate);
  check_like_gate(op, "grad_h", grad_h, gate);
  const DeviceGuard guard(gate.get_device_index());
  Tensor grad_gate = torch::stable::new_empty(gate, {gate.size(0), gate.size(1)}, gate.scalar_type());
  Tensor grad_up = torch::stable::new_empty(gate, {gate.size(0), gate.size(1)}, gate.scalar_type());
  if (gate.numel() == 0) return {grad_gate, grad_up};
  const BackwardArguments a = {
      rows_view(grad_h),
      rows_view(gate),
      rows_view(up),
      rows_view(grad_gate, grad_gate.mutable_data_ptr()),
      rows_view(grad_up, grad_up.mutable_data_ptr()),
      size_of(gate)};
  with_element_type(dtype_of(gate.scalar_type()), [&](auto element) {
    using Element = decltype(element);
    launch(
        op, grid_of<Element, kBackwardRows>(a.size), swiglu_backward_kernel<Element>, a,
        {{"grad_h", grad_h},
         {"gate", gate},
         {"up", up},
         {"grad_gate", grad_gate, Access::write},
         {"grad_up", grad_up, Access::write}});
  });
  return {grad_gate, grad_up};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("swiglu", TORCH_BOX(&peft_kernels::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&peft_kernels::swiglu_backward));
}
