// The kernel behind partial_sums.h: reads 4 bytes per split and element, once.
#include "partial_sums.h"

#include <cuda_runtime.h>
#include <launch.cuh>

namespace peft_kernels {
namespace {

constexpr int kThreads = 256;

struct PartialSumsArguments {
  const float* partial;
  void* out;
  int64_t splits, count;
  DType dtype;
};

__global__ void __launch_bounds__(kThreads) partial_sums_kernel(const __grid_constant__ PartialSumsArguments a) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= a.count) return;
  float sum = 0.0f;
  for (int64_t split = 0; split < a.splits; ++split) sum += a.partial[split * a.count + index];
  store_float(a.out, index, a.dtype, sum);
}

}  // namespace

void add_partial_sums(const char* operation, const Tensor& partial, const Tensor& out) {
  const PartialSumsArguments arguments = {
      static_cast<const float*>(partial.const_data_ptr()), out.mutable_data_ptr(), partial.size(0), out.numel(),
      dtype_of(out.scalar_type())};
  const Grid grid = {.x = (out.numel() + kThreads - 1) / kThreads, .threads = kThreads};
  launch(
      operation, grid, partial_sums_kernel, arguments,
      {{"partial", partial, Access::read}, {"out", out, Access::write}});
}

}  // namespace peft_kernels
