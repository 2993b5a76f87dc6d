// Losses of the rows of logits [C, V], which become scale times their own gradient, in place. Formulas in
// peft_kernels/reference/cross_entropy.py.
//
// Bytes, e to a logit: a row is read twice and written once, the second time from L2: one row of V = 128256 in 16 bits
// on each of 132 multiprocessors are 34 MB of the 50 an H100 has. So memory moves 2 e C V, at C = 4096 and that V
// 2.1 GB, 0.70 ms at 3.0 TB/s [calculated]. For that a block is as large as it can be and alone on its multiprocessor.
// Rows without a label are written only. Operations: two exponentials per logit and some thirty instructions in all,
// 0.55 ms at that size [calculated], beside the reads. The second exponential is the fast one in 16-bit types: its few
// units in float's last place do not show there; the first one makes the loss, a float, and is not.
//
// A block takes a row. A thread carries the largest logit it has seen and the sum of exponentials below it, so that one
// read gives both. The order of additions follows from V alone.
#include <cuda_runtime.h>
#include <launch.cuh>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <limits>

#include "../common/cross_entropy_checks.h"
#include "picked_chunks.h"

namespace peft_kernels {
namespace {

constexpr bool kTakesFloat64 = false;
constexpr int kWarps = 32, kThreads = kLanes * kWarps;
constexpr int kAhead = 4;  // chunks that a thread has under way
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The sum of exp(x - base of largest) over some numbers x.
struct Exponentials {
  float largest = -kInfinity, sum = 0.0f;

  // What is subtracted in front of the exponential; an infinity less itself would be NaN.
  __device__ __forceinline__ static float base(float largest) { return fabsf(largest) == kInfinity ? 0.0f : largest; }

  // Brings the sum to another largest number, at least as large.
  __device__ __forceinline__ void raise(float to) {
    sum = __fmul_rn(sum, expf(largest - base(to)));
    largest = to;
  }

  // The same bits whichever of the two comes first; so no product may be fused with the sum.
  __device__ __forceinline__ void join(Exponentials other) {
    const float to = fmaxf(largest, other.largest);
    raise(to);
    other.raise(to);
    sum = __fadd_rn(sum, other.sum);
  }

  __device__ __forceinline__ void join_warp() {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      Exponentials other;
      other.largest = __shfl_xor_sync(~0u, largest, distance);
      other.sum = __shfl_xor_sync(~0u, sum, distance);
      join(other);
    }
  }

  __device__ __forceinline__ float logarithm() const { return base(largest) + logf(sum); }
};

template <typename Element>
__device__ __forceinline__ void add_chunk(Exponentials& seen, const Chunk<Element>& chunk, int64_t count) {
  float largest = seen.largest, sum = 0.0f;
#pragma unroll
  for (int c = 0; c < kChunk<Element>; ++c) largest = fmaxf(largest, c < count ? chunk[c] : -kInfinity);
  seen.raise(largest);
  const float base = Exponentials::base(largest);
#pragma unroll
  for (int c = 0; c < kChunk<Element>; ++c) sum += c < count ? expf(chunk[c] - base) : 0.0f;
  seen.sum += sum;
}

struct CrossEntropyArguments {
  RowsView logits;
  const int64_t* labels;
  int64_t label_stride;
  float* losses;
  int64_t columns;
  float scale;
};

// Calls visit(column, chunk) for the thread's chunks of a row, a few of them read at a time.
template <typename Element, typename Visit>
__device__ __forceinline__ void for_chunks(const RowsView& rows, int64_t row, int64_t columns, const Visit& visit) {
  constexpr int64_t kStep = kThreads * kChunk<Element>;
#pragma unroll 1
  for (int64_t first = int64_t{threadIdx.x} * kChunk<Element>; first < columns; first += kAhead * kStep) {
    Chunk<Element> chunks[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) chunks[i] = load_chunk<Element>(rows, row, first + i * kStep, columns);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i * kStep < columns) visit(first + i * kStep, chunks[i]);
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads) cross_entropy_rows_kernel(const __grid_constant__ CrossEntropyArguments a) {
  __shared__ Exponentials of_warps[kWarps];
  const int64_t row = blockIdx.x, label = a.labels[row * a.label_stride];
  const int lane = static_cast<int>(threadIdx.x) % kLanes, warp = static_cast<int>(threadIdx.x) / kLanes;
  float loss = 0.0f, total = 0.0f;
  if (label >= 0) {
    // Read before the row is written. A label that there is no logit for has no loss; the row's memory ends there.
    float target = std::numeric_limits<float>::quiet_NaN();
    if (threadIdx.x == 0 && label < a.columns) {
      target = static_cast<float>(static_cast<const Element*>(a.logits.data)[row * a.logits.row_stride + label]);
    }
    Exponentials seen;
    for_chunks<Element>(a.logits, row, a.columns, [&](int64_t column, const Chunk<Element>& chunk) {
      add_chunk(seen, chunk, a.columns - column);
    });
    seen.join_warp();
    if (lane == 0) of_warps[warp] = seen;
    __syncthreads();
    static_assert(kWarps == kLanes);
    seen = of_warps[lane];
    seen.join_warp();
    total = seen.logarithm();
    loss = total - target;
  }
  if (threadIdx.x == 0) a.losses[row] = loss;
  if (label < 0 || a.scale == 0.0f) {  // whatever the logits are
    const Chunk<Element> zeros = {};
    for (int64_t column = int64_t{threadIdx.x} * kChunk<Element>; column < a.columns;
         column += kThreads * kChunk<Element>) {
      store_chunk(a.logits, row, column, a.columns, zeros);
    }
    return;
  }
  for_chunks<Element>(a.logits, row, a.columns, [&](int64_t column, const Chunk<Element>& chunk) {
    Chunk<Element> grad = {};
#pragma unroll
    for (int c = 0; c < kChunk<Element>; ++c) {
      const float below = chunk[c] - total, share = sizeof(Element) == 4 ? expf(below) : __expf(below);
      grad.set(c, (share - (column + c == label ? 1.0f : 0.0f)) * a.scale);
    }
    store_chunk(a.logits, row, column, a.columns, grad);
  });
}

Tensor cross_entropy_rows_(Tensor logits, const Tensor& labels, double scale) {
  constexpr const char* op = "cross_entropy_rows_";
  check_cross_entropy_rows(op, logits, labels, scale, kTakesFloat64);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor losses = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Float);
  if (losses.numel() == 0) return losses;
  const CrossEntropyArguments a = {
      rows_view(logits, logits.mutable_data_ptr()),
      static_cast<const int64_t*>(labels.const_data_ptr()),
      labels.stride(0),
      static_cast<float*>(losses.mutable_data_ptr()),
      logits.size(1),
      static_cast<float>(scale)};
  with_element_type(dtype_of(logits.scalar_type()), [&](auto element) {
    launch(
        op, {.x = logits.size(0), .threads = kThreads}, cross_entropy_rows_kernel<decltype(element)>, a,
        {{"logits", logits, Access::write}, {"labels", labels}, {"losses", losses, Access::write}});
  });
  return losses;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("cross_entropy_rows_", TORCH_BOX(&peft_kernels::cross_entropy_rows_));
}
