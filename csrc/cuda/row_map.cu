// The kernel behind row_map.h.
#include "row_map.h"

#include <cuda_runtime.h>
#include <launch.cuh>
#include <torch/csrc/stable/ops.h>

namespace peft_kernels {
namespace {

constexpr int kThreads = 256;

struct RowMapArguments {
  const int32_t* rows;
  int64_t count;
  uint32_t* map;  // zeros before
};

__global__ void __launch_bounds__(kThreads) row_map_kernel(const __grid_constant__ RowMapArguments a) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= a.count) return;
  const int32_t row = a.rows[place];
  if (row >= 0) a.map[row] = static_cast<uint32_t>(place + 1);
}

}  // namespace

Tensor row_map(const char* operation, const Tensor& rows, int64_t total) {
  const Tensor map = torch::stable::new_zeros(rows, {total});
  if (total == 0 || rows.numel() == 0) return map;
  const Tensor own_rows = torch::stable::contiguous(rows);
  const RowMapArguments a = {
      static_cast<const int32_t*>(own_rows.const_data_ptr()), rows.numel(),
      static_cast<uint32_t*>(map.mutable_data_ptr())};
  const Grid grid = {.x = (a.count + kThreads - 1) / kThreads, .threads = kThreads};
  launch(operation, grid, row_map_kernel, a, {{"rows", own_rows}, {"map", map, Access::write}});
  return map;
}

}  // namespace peft_kernels
