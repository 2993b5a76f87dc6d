// The keep mask of a Philox stream: M C bytes written, some 60 integer instructions per 8 of them, which bounds it. A
// thread writes 16 neighboring columns of a row: two Philox calls, one 16-byte store.
#include <cuda_runtime.h>
#include <launch.cuh>

#include "../common/philox.h"
#include "lora_kernels.h"

namespace peft_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kMaskUnit = 2 * kPhiloxGroup;

// keep is bool [rows, columns], contiguous and 16-byte aligned, as torch allocates it.
struct MaskArguments {
  uint8_t* keep;
  const int64_t* rng_state;
  int64_t rows, columns;
  uint32_t threshold;
};

// `unit` counts units along the rows; one past the last row does nothing.
__device__ __forceinline__ void write_mask_unit(const MaskArguments& a, int64_t unit) {
  struct alignas(16) Bytes {
    uint32_t words[4];
  };
  const int64_t units_per_row = (a.columns + kMaskUnit - 1) / kMaskUnit;
  const int64_t row = unit / units_per_row;
  const int64_t column = unit % units_per_row * kMaskUnit;
  if (row >= a.rows) return;
  const RngState state = {a.rng_state[0], a.rng_state[1]};
  Bytes bytes = {};
  for (int half = 0; half < 2; ++half) {
    uint32_t draws[4];
    philox_4x32_10(state, static_cast<uint32_t>(column / kPhiloxGroup + half), static_cast<uint32_t>(row), draws);
    for (int c = 0; c < kPhiloxGroup; ++c) {
      const uint32_t keep = philox_draw(draws, c) >= a.threshold;
      bytes.words[2 * half + c / 4] |= keep << (c % 4 * 8);
    }
  }
  uint8_t* keep = a.keep + row * a.columns + column;
  if (a.columns % kMaskUnit == 0) {
    *reinterpret_cast<Bytes*>(keep) = bytes;
    return;
  }
  for (int c = 0; c < kMaskUnit; ++c) {
    if (column + c < a.columns) keep[c] = static_cast<uint8_t>(bytes.words[c / 4] >> (c % 4 * 8));
  }
}

__global__ void __launch_bounds__(kThreads) dropout_mask_kernel(const __grid_constant__ MaskArguments a) {
  write_mask_unit(a, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
}

}  // namespace

void start_dropout_mask(const char* operation, const Tensor& keep, double dropout_p, const Tensor& rng_state) {
  if (keep.numel() == 0) return;
  MaskArguments a = {};
  a.keep = static_cast<uint8_t*>(keep.mutable_data_ptr());
  a.rng_state = static_cast<const int64_t*>(rng_state.const_data_ptr());
  a.rows = keep.size(0);
  a.columns = keep.size(1);
  a.threshold = dropout_threshold(dropout_p);
  const int64_t units = a.rows * ((a.columns + kMaskUnit - 1) / kMaskUnit);
  const Grid grid = {.x = (units + kThreads - 1) / kThreads, .threads = kThreads};
  launch(operation, grid, dropout_mask_kernel, a, {{"rng_state", rng_state}, {"keep", keep, Access::write}});
}

}  // namespace peft_kernels
