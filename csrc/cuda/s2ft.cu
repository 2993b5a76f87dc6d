// Slices of channels on CUDA devices: the columns of x that backward needs, the slice's way into the weight, and AdamW
// on a slice with that write in the same pass. Formulas in peft_kernels/reference/s2ft.py.
//
// Bytes, e to an element of x or of the weight:
// gather_columns writes e M s and reads as much where channels are neighbors (heads, permuted weights), else the sector
// of 32 bytes of each that stands alone: 113 MB at M = 8192 and 430 channels, 38 us of an H100's memory [calculated].
// slice_write_ reads the values, 4 per entry in float, and writes e; slice_adamw_ reads 16 and writes 12 + e per entry
// (value, gradient and two moments in float). At dim 0 the weight is written in runs, at dim 1 a lone channel costs its
// sector, read and written. The channels, 8 s, stay in L1. slice_exchange_ reads what is held, e, and the change, 4 per
// entry in float, writes the original, e, and touches each sector of the weight for the slice that it leaves and for
// the one that comes. Memory bounds all four; each thread has all its reads under way before it uses the first.
#include <cuda_runtime.h>
#include <launch.cuh>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../common/slice_checks.h"
#include "adamw.h"
#include "slice_entries.h"

namespace peft_kernels {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr bool kTakesFloat64 = false;
constexpr int kThreads = 256;

// --- out [M, s] = x[:, indices] ---

struct GatherArguments {
  const void* x;
  void* out;  // contiguous, aligned as torch allocates
  const int64_t* indices;
  int64_t columns;  // s
  int64_t count;    // M s
  int64_t row_stride, column_stride;
  bool narrow;  // whether results can be counted with 32 bits
};

// A thread has 16 bytes of the results, which follow one another from row to row, so that stores are whole for any s.
template <typename Bits>
__global__ void __launch_bounds__(kThreads) gather_columns_kernel(const __grid_constant__ GatherArguments a) {
  constexpr int kBytes = 16, kChunk = kBytes / sizeof(Bits);
  struct alignas(kBytes) Chunk {
    Bits values[kChunk];
  };
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kChunk;
  if (first >= a.count) return;
  int64_t row = quotient(first, a.columns, a.narrow), column = first - row * a.columns;
  const Bits* x = static_cast<const Bits*>(a.x);
  Bits* out = static_cast<Bits*>(a.out) + first;
  if (a.column_stride == 1 && column + kChunk <= a.columns) {
    const int64_t channel = a.indices[column];
    const Bits* from = x + row * a.row_stride + channel;
    // Channels ascend, so the first and the last one tell whether they are neighbors.
    const bool run = a.indices[column + kChunk - 1] - channel == kChunk - 1;
    if (run && reinterpret_cast<uintptr_t>(from) % kBytes == 0) {
      *reinterpret_cast<Chunk*>(out) = *reinterpret_cast<const Chunk*>(from);
      return;
    }
  }
  int64_t offsets[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    offsets[i] = row * a.row_stride + a.indices[column] * a.column_stride;
    if (++column == a.columns) {
      column = 0;
      ++row;
    }
  }
  Chunk chunk = {};
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (first + i < a.count) chunk.values[i] = x[offsets[i]];
  }
  if (first + kChunk <= a.count) {
    *reinterpret_cast<Chunk*>(out) = chunk;
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (first + i < a.count) out[i] = chunk.values[i];
  }
}

Tensor gather_columns(const Tensor& x, const Tensor& indices) {
  constexpr const char* op = "gather_columns";
  check_activations(op, "x", x, kTakesFloat64);
  const int64_t channels = check_channels(op, indices, x.size(1), x);
  const DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {x.size(0), channels}, x.scalar_type());
  if (out.numel() == 0) return out;
  GatherArguments a = {};
  a.x = x.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  a.columns = channels;
  a.count = out.numel();
  a.row_stride = x.stride(0);
  a.column_stride = x.stride(1);
  a.narrow = fits_32_bits(a.count);
  const auto start = [&](auto bits) {
    constexpr int64_t kBlock = kThreads * 16 / sizeof(bits);
    const Grid grid = {.x = (a.count + kBlock - 1) / kBlock, .threads = kThreads};
    launch(
        op, grid, gather_columns_kernel<decltype(bits)>, a,
        {{"x", x}, {"indices", indices}, {"out", out, Access::write}});
  };
  if (x.element_size() == 4) {
    start(uint32_t());
  } else {
    start(uint16_t());
  }
  return out;
}

// --- weight[:, indices] = values, or weight[indices, :] ---

struct SliceWriteArguments {
  SliceTarget target;
  Stream values;
  int64_t count;
};

// What memory holds of one dtype, rounded to another; of the same one its bits, so that a NaN stays the one it was.
__device__ __forceinline__ PackedEntries converted(const PackedEntries& packed, DType from, DType to) {
  if (from == to) return packed;
  float numbers[kThreadEntries];
  unpack(packed, from, numbers);
  return pack(to, numbers);
}

__global__ void __launch_bounds__(kEntryThreads) slice_write_kernel(const __grid_constant__ SliceWriteArguments a) {
  const EntryRange range = entries_of_thread(a.count);
  if (range.count == 0) return;
  const PackedEntries values = load_packed(a.values, range);
  int64_t positions[kThreadEntries];
  load_positions(a.target, range, positions);
  store_entries(a.target, range, positions, converted(values, a.values.dtype, a.target.dtype));
}

void slice_write_(Tensor weight, const Tensor& indices, const Tensor& values, int64_t dim) {
  constexpr const char* op = "slice_write_";
  check_slice(op, "values", weight, indices, values, dim, kTakesFloat64);
  if (values.numel() == 0) return;
  const DeviceGuard guard(weight.get_device_index());
  const Tensor source = torch::stable::contiguous(values);
  const SliceWriteArguments a = {slice_target(weight, indices, source, dim), stream_of(source), source.numel()};
  launch(
      op, grid_of_entries(a.count), slice_write_kernel, a,
      {{"weight", weight, Access::write}, {"indices", indices}, {"values", source}});
}

// --- one slice for another ---

// Every entry of the weight has one thread, which looks its channel up in the other slice's list: an entry of both is
// the new slice's, and what stood there is what is held. So nobody waits for anybody, and one launch does at either
// dim; blocks that own rows at dim 1 and columns at dim 0 would need a barrier, and leave a GPU idle where the weight
// is small.
struct SliceExchangeArguments {
  SliceTarget target, held_target;
  Stream change, original, held;
  int64_t channels, held_channels;
  int64_t count, held_count;  // entries
  int64_t blocks;             // that have the new slice; those behind them restore
};

// Place of a channel in an ascending list, -1 where it is not.
__device__ __forceinline__ int64_t place_of(int64_t channel, const int64_t* indices, int64_t count) {
  int64_t first = 0, last = count;
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    if (indices[middle] < channel) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first < count && indices[first] == channel ? first : -1;
}

// Which entries of another slice a thread's entries are, -1 for those that it has not.
__device__ __forceinline__ void entries_in(
    const SliceTarget& other, int64_t other_channels, const SliceTarget& own, const EntryRange& range,
    int64_t (&entries)[kThreadEntries]) {
  int64_t row = quotient(range.first, own.columns, own.narrow), column = range.first - row * own.columns;
#pragma unroll
  for (int i = 0; i < kThreadEntries; ++i) {
    entries[i] = -1;
    if (i < range.count) {
      const int64_t place = place_of(own.indices[own.rows ? row : column], other.indices, other_channels);
      if (place >= 0) entries[i] = own.rows ? place * other.columns + column : row * other.columns + place;
    }
    if (++column == own.columns) {
      column = 0;
      ++row;
    }
  }
}

__device__ __forceinline__ void write_change(const SliceExchangeArguments& a) {
  const EntryRange range = entries_of_thread(a.count);
  if (range.count == 0) return;
  const PackedEntries change = load_packed(a.change, range);
  const DType dtype = a.target.dtype;
  int64_t positions[kThreadEntries], held[kThreadEntries];
  load_positions(a.target, range, positions);
  entries_in(a.held_target, a.held_channels, a.target, range, held);
  PackedEntries original = {};
#pragma unroll
  for (int i = 0; i < kThreadEntries; ++i) {
    if (i >= range.count) continue;
    const void* from = held[i] < 0 ? a.target.weight : a.held.data;
    const int64_t place = held[i] < 0 ? positions[i] : held[i];
    if (dtype == DType::float32) {
      original.words[i] = static_cast<const uint32_t*>(from)[place];
    } else {
      original.words[i / 2] |= static_cast<uint32_t>(static_cast<const uint16_t*>(from)[place]) << i % 2 * 16;
    }
  }
  store_packed(a.original, range, original);
  float sums[kThreadEntries], changes[kThreadEntries];
  unpack(original, dtype, sums);
  unpack(change, a.change.dtype, changes);
#pragma unroll
  for (int i = 0; i < kThreadEntries; ++i) sums[i] = __fadd_rn(sums[i], changes[i]);
  store_entries(a.target, range, positions, pack(dtype, sums));
}

__device__ __forceinline__ void restore_held(const SliceExchangeArguments& a) {
  const EntryRange range = entries_of_thread(a.held_count, blockIdx.x - a.blocks);
  if (range.count == 0) return;
  const PackedEntries held = load_packed(a.held, range);
  int64_t positions[kThreadEntries], changed[kThreadEntries];
  load_positions(a.held_target, range, positions);
  entries_in(a.target, a.channels, a.held_target, range, changed);
#pragma unroll
  for (int i = 0; i < kThreadEntries; ++i) {
    if (i >= range.count || changed[i] >= 0) continue;
    if (a.held.dtype == DType::float32) {
      static_cast<uint32_t*>(a.target.weight)[positions[i]] = held.words[i];
    } else {
      static_cast<uint16_t*>(a.target.weight)[positions[i]] = static_cast<uint16_t>(held.words[i / 2] >> i % 2 * 16);
    }
  }
}

__global__ void __launch_bounds__(kEntryThreads)
    slice_exchange_kernel(const __grid_constant__ SliceExchangeArguments a) {
  if (blockIdx.x < a.blocks) {
    write_change(a);
  } else {
    restore_held(a);
  }
}

void slice_exchange_(
    Tensor weight, std::optional<Tensor> held_indices, std::optional<Tensor> held, const Tensor& indices,
    const Tensor& change, Tensor original, int64_t dim) {
  constexpr const char* op = "slice_exchange_";
  check_slice_exchange(op, weight, held_indices, held, indices, change, original, dim, kTakesFloat64);
  const DeviceGuard guard(weight.get_device_index());
  const Tensor changes = torch::stable::contiguous(change);
  const Tensor kept = held.has_value() ? torch::stable::contiguous(*held) : original;
  SliceExchangeArguments a = {};
  a.target = a.held_target = slice_target(weight, indices, changes, dim);
  a.change = stream_of(changes);
  a.original = stream_of(original, original.mutable_data_ptr());
  a.channels = indices.numel();
  a.count = changes.numel();
  Grid grid = grid_of_entries(a.count);
  a.blocks = grid.x;
  if (held.has_value()) {
    a.held_target = slice_target(weight, *held_indices, kept, dim);
    a.held = stream_of(kept);
    a.held_channels = held_indices->numel();
    a.held_count = kept.numel();
    grid.x += grid_of_entries(a.held_count).x;
  }
  if (grid.x == 0) return;
  launch(
      op, grid, slice_exchange_kernel, a,
      {{"weight", weight, Access::write},
       {"held_indices", held.has_value() ? *held_indices : indices},
       {"held", kept},
       {"indices", indices},
       {"change", changes},
       {"original", original, Access::write}});
}

// --- AdamW on a slice, and the write ---

struct SliceAdamWArguments {
  AdamWState state;
  SliceTarget target;  // weight null: nothing is written back
};

__global__ void __launch_bounds__(kEntryThreads) slice_adamw_kernel(const __grid_constant__ SliceAdamWArguments a) {
  const EntryRange range = entries_of_thread(a.state.count);
  if (range.count == 0) return;
  const bool written = a.target.weight != nullptr;
  int64_t positions[kThreadEntries] = {};
  if (written) load_positions(a.target, range, positions);
  const PackedEntries values = adamw_step(a.state, range);  // rounded: the weight gets what the parameter holds
  if (!written) return;
  store_entries(a.target, range, positions, converted(values, a.state.values.dtype, a.target.dtype));
}

void slice_adamw_(
    Tensor trainable, const Tensor& grad, Tensor exp_avg, Tensor exp_avg_sq, std::optional<Tensor> weight,
    std::optional<Tensor> indices, int64_t dim, int64_t step, double lr, double beta1, double beta2, double eps,
    double weight_decay) {
  constexpr const char* op = "slice_adamw_";
  const bool written = check_slice_adamw(op, trainable, grad, exp_avg, exp_avg_sq, weight, indices, dim, kTakesFloat64);
  check_adamw_numbers(op, step, lr, beta1, beta2, eps, weight_decay);
  if (trainable.numel() == 0) return;
  const DeviceGuard guard(trainable.get_device_index());
  SliceAdamWArguments a = {};
  a.state = adamw_state(trainable, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay);
  if (written) a.target = slice_target(*weight, *indices, trainable, dim);
  launch(
      op, grid_of_entries(trainable.numel()), slice_adamw_kernel, a,
      {{"trainable", trainable, Access::write},
       {"grad", grad},
       {"exp_avg", exp_avg, Access::write},
       {"exp_avg_sq", exp_avg_sq, Access::write},
       {"weight", written ? *weight : trainable, Access::write},
       {"indices", written ? *indices : trainable}});
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("gather_columns", TORCH_BOX(&peft_kernels::gather_columns));
  m.impl("slice_write_", TORCH_BOX(&peft_kernels::slice_write_));
  m.impl("slice_exchange_", TORCH_BOX(&peft_kernels::slice_exchange_));
  m.impl("slice_adamw_", TORCH_BOX(&peft_kernels::slice_adamw_));
}
