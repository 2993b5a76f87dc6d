// Set algebra on sorted unique positions: sorted_merge of arrays without a common element, and sorted_contains.
//
// A thread takes an element and searches the other array for it: some twenty reads of L2, which neighbors share almost
// to the last, as they look for almost the same. Bytes from and to memory, in 4-byte positions: 8 per element of a
// merge and 8 of its source, 5 per element of sorted_contains and 4 of what is searched. Latency bounds it, at the few
// microseconds of a launch for what a weight has of entries.
#include <cuda_runtime.h>
#include <launch.cuh>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "../common/sparse_checks.h"
#include "indices.h"

namespace peft_kernels {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr int kThreads = 256;

Grid grid_of_elements(int64_t count) { return {.x = (count + kThreads - 1) / kThreads, .threads = kThreads}; }

__device__ __forceinline__ int64_t element_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

struct MergeArguments {
  IndicesView first, second;
  int64_t first_count, second_count;
  void* merged;
  int64_t* source;
};

__global__ void __launch_bounds__(kThreads) sorted_merge_kernel(const __grid_constant__ MergeArguments a) {
  const int64_t from = element_of_thread();
  if (from >= a.first_count + a.second_count) return;
  int64_t position, place;
  if (from < a.first_count) {
    position = a.first[from];
    place = from + lower_bound(a.second, 0, a.second_count, position);
  } else {
    const int64_t own = from - a.first_count;
    position = a.second[own];
    // Behind its equal, of which there should be none: so every place is written whatever the arrays hold.
    place = own + lower_bound(a.first, 0, a.first_count, position + 1);
  }
  if (a.first.wide) {
    static_cast<int64_t*>(a.merged)[place] = position;
  } else {
    static_cast<int32_t*>(a.merged)[place] = static_cast<int32_t>(position);
  }
  a.source[place] = from;
}

struct ContainsArguments {
  IndicesView indices, other;
  int64_t count, other_count;
  bool* contained;
};

__global__ void __launch_bounds__(kThreads) sorted_contains_kernel(const __grid_constant__ ContainsArguments a) {
  const int64_t entry = element_of_thread();
  if (entry >= a.count) return;
  const int64_t position = a.indices[entry], place = lower_bound(a.other, 0, a.other_count, position);
  a.contained[entry] = place < a.other_count && a.other[place] == position;
}

std::tuple<Tensor, Tensor> sorted_merge(const Tensor& first, const Tensor& second) {
  constexpr const char* op = "sorted_merge";
  check_sorted_pair(op, "first", first, "second", second);
  const DeviceGuard guard(first.get_device_index());
  const int64_t count = first.numel() + second.numel();
  Tensor merged = torch::stable::new_empty(first, {count});
  Tensor source = torch::stable::new_empty(first, {count}, ScalarType::Long);
  if (count == 0) return {merged, source};
  const MergeArguments arguments = {
      indices_view(first), indices_view(second),      first.numel(),
      second.numel(),      merged.mutable_data_ptr(), static_cast<int64_t*>(source.mutable_data_ptr())};
  launch(
      op, grid_of_elements(count), sorted_merge_kernel, arguments,
      {{"first", first}, {"second", second}, {"merged", merged, Access::write}, {"source", source, Access::write}});
  return {merged, source};
}

Tensor sorted_contains(const Tensor& indices, const Tensor& other) {
  constexpr const char* op = "sorted_contains";
  check_sorted_pair(op, "indices", indices, "other", other);
  const DeviceGuard guard(indices.get_device_index());
  Tensor contained = torch::stable::new_empty(indices, {indices.numel()}, ScalarType::Bool);
  if (contained.numel() == 0) return contained;
  const ContainsArguments arguments = {
      indices_view(indices), indices_view(other), indices.numel(), other.numel(),
      static_cast<bool*>(contained.mutable_data_ptr())};
  launch(
      op, grid_of_elements(contained.numel()), sorted_contains_kernel, arguments,
      {{"indices", indices}, {"other", other}, {"contained", contained, Access::write}});
  return contained;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("sorted_merge", TORCH_BOX(&peft_kernels::sorted_merge));
  m.impl("sorted_contains", TORCH_BOX(&peft_kernels::sorted_contains));
}
