// CUDA kernels of the LoRA family; formulas in peft_kernels/reference/lora.py and philox.py.
//
// Written against libtorch's stable ABI, so that the library builds without a CUDA build of torch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <cstdint>
#include <optional>
#include <string>

#include "checks.h"
#include "launch.cuh"
#include "lora_arguments.h"
#include "lora_tile.h"
#include "mask_unit.h"

namespace peft_kernels {
namespace {

using torch::stable::accelerator::DeviceGuard;

// out += D * (scale hidden factor); the phases are in lora_tile.h.
//
// Traffic: out is read and written once, 4 M C bytes in 16-bit types and 8 M C in float; hidden and factor come from L2
// after their first read. Work: 2 M C r FLOP on the CUDA cores in float, which is 8 FLOP per byte at r = 16 and 16
// bits: bound by memory up to about r = 32 (H100: 67 TFLOP/s over 3.0 TB/s), by arithmetic beyond [calculated]. With
// dropout one Philox call, some 60 integer instructions, per 8 elements.
//
// Compiled for every architecture and run phase by phase on the CPU; not yet run on a GPU.
template <typename Out, typename Factor>
__global__ void __launch_bounds__(kThreads, 2) accumulate_kernel(const __grid_constant__ AccumulateArguments a) {
  __shared__ TileMemory shared;
  const int thread = static_cast<int>(threadIdx.x);
  const Position position = position_of(blockIdx.x, thread, a.columns);
  ThreadTile<Out> tile;
  load_out(a, position, tile);
  for (int64_t first = 0; first < a.rank; first += kRankChunk) {
    load_hidden(a, position, thread, first, shared);
    load_factor<Factor>(a, position, thread, first, shared);
    __syncthreads();
    multiply(thread, rank_depth(a, first), shared, tile);
    __syncthreads();  // the next chunk overwrites what slower warps may still read
  }
  store_out(a, position, tile);
}

// The keep mask: M C bytes written, 60 integer instructions per 8 of them, which is what bounds it.
__global__ void __launch_bounds__(kThreads) dropout_mask_kernel(const __grid_constant__ MaskArguments a) {
  write_mask_unit(a, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
}

Tensor dropout_mask(int64_t rows, int64_t columns, double dropout_p, const Tensor& rng_state) {
  constexpr const char* operation = "dropout_mask";
  check_mask_rows(operation, rows);
  STD_TORCH_CHECK(columns >= 0, operation, ": columns must not be negative, got ", columns);
  check_dropout_p(operation, dropout_p);
  check_rng_state(operation, rng_state);
  const int32_t device = rng_state.get_device_index();
  const DeviceGuard guard(device);
  Tensor keep = torch::stable::new_empty(rng_state, {rows, columns}, ScalarType::Bool);
  if (rows == 0 || columns == 0) return keep;
  MaskArguments arguments = {};
  arguments.keep = static_cast<uint8_t*>(keep.mutable_data_ptr());
  arguments.rng_state = static_cast<const int64_t*>(rng_state.const_data_ptr());
  arguments.rows = rows;
  arguments.columns = columns;
  arguments.threshold = dropout_threshold(dropout_p);
  const Grid grid = {divide_up(mask_units(rows, columns), kThreads), kThreads};
  launch(operation, device, grid, dropout_mask_kernel, arguments, [&] { return "keep " + described(keep); });
  return keep;
}

// `data` is the matrix's own pointer, const or mutable: asking for a mutable one can copy a lazily copied tensor.
MatrixView view(const Tensor& matrix, const void* data) {
  const auto element_bytes = static_cast<int64_t>(matrix.element_size());
  return {const_cast<void*>(data), matrix.size(0), matrix.size(1), matrix.stride(0), matrix.stride(1), element_bytes};
}

void check_accumulate(
    const char* operation, const Tensor& out, const Tensor& hidden, const Tensor& factor, double dropout_p,
    const std::optional<Tensor>& rng_state) {
  STD_TORCH_CHECK(
      out.dim() == 2 && is_activation_dtype(out.scalar_type()), operation,
      ": out must be float32, bfloat16 or float16 [M, C], got ", described(out));
  STD_TORCH_CHECK(
      out.numel() == 0 || elements_are_apart(view(out, nullptr)), operation,
      ": out must not overlap itself in memory, got ", described(out), " with strides [", out.stride(0), ", ",
      out.stride(1), "]");
  STD_TORCH_CHECK(
      hidden.dim() == 2 && hidden.scalar_type() == ScalarType::Float && hidden.size(0) == out.size(0) &&
          on_device_of(hidden, out),
      operation, ": hidden must be float32 [", out.size(0), ", r] on out's device, got ", described(hidden),
      " with out ", described(out));
  STD_TORCH_CHECK(
      factor.dim() == 2 && is_activation_dtype(factor.scalar_type()) && factor.size(0) == hidden.size(1) &&
          factor.size(1) == out.size(1) && on_device_of(factor, out),
      operation, ": factor must be float32, bfloat16 or float16 [", hidden.size(1), ", ", out.size(1),
      "] on out's device, got ", described(factor), " with out ", described(out));
  check_dropout_p(operation, dropout_p);
  STD_TORCH_CHECK(
      dropout_p == 0.0 || rng_state.has_value(), operation, ": rng_state is needed when dropout_p > 0, got None");
  if (!rng_state.has_value()) return;
  check_rng_state(operation, *rng_state);
  check_mask_rows(operation, out.size(0));
  STD_TORCH_CHECK(
      on_device_of(*rng_state, out), operation, ": rng_state must be on out's device, got ", described(*rng_state),
      " with out ", described(out));
}

void lora_accumulate_(
    Tensor out, const Tensor& hidden, const Tensor& factor, double scaling, double dropout_p,
    std::optional<Tensor> rng_state) {
  constexpr const char* operation = "lora_accumulate_";
  check_accumulate(operation, out, hidden, factor, dropout_p, rng_state);
  if (out.numel() == 0 || hidden.size(1) == 0) return;
  const int32_t device = out.get_device_index();
  const DeviceGuard guard(device);
  const void* state = rng_state.has_value() ? rng_state->const_data_ptr() : nullptr;
  const AccumulateArguments arguments = accumulate_arguments(
      view(out, out.mutable_data_ptr()), view(hidden, hidden.const_data_ptr()), view(factor, factor.const_data_ptr()),
      scaling, dropout_p, static_cast<const int64_t*>(state));
  const auto describe = [&] {
    return "out " + described(out) + ", hidden " + described(hidden) + ", factor " + described(factor);
  };
  const auto run = [&](auto out_type, auto factor_type) {
    using Out = decltype(out_type);
    using Factor = decltype(factor_type);
    const Grid grid = {accumulate_blocks(arguments.rows, arguments.columns), kThreads};
    launch(operation, device, grid, accumulate_kernel<Out, Factor>, arguments, describe);
  };
  THO_DISPATCH_V2(
      out.scalar_type(), operation, AT_WRAP([&] {
        using Out = scalar_t;
        THO_DISPATCH_V2(
            factor.scalar_type(), operation, AT_WRAP([&] { run(Out(), scalar_t()); }), ScalarType::Float,
            ScalarType::BFloat16, ScalarType::Half);
      }),
      ScalarType::Float, ScalarType::BFloat16, ScalarType::Half);
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("dropout_mask", TORCH_BOX(&peft_kernels::dropout_mask));
  m.impl("lora_accumulate_", TORCH_BOX(&peft_kernels::lora_accumulate_));
}
