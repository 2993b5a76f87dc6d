// The entries of a sparse delta, four neighbors to a thread: all reads of a thread are under way before the first one
// is used, and 16 bytes of float or of int32 positions are one of them. Positions are unique, so that no two threads
// write the same element of the weight, and sorted, so that a warp's elements lie close together.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

#include "dtypes.h"
#include "indices.h"
#include "launch_arguments.h"

namespace peft_kernels {

constexpr int kEntryThreads = 256;
constexpr int kThreadEntries = 4;

// What a thread has of each stream: entries [first, first + count), none where count is 0.
struct EntryRange {
  int64_t first;
  int count;
};

__device__ __forceinline__ EntryRange entries_of_thread(int64_t entries, int64_t block) {
  const int64_t first = (block * kEntryThreads + threadIdx.x) * kThreadEntries;
  const int64_t left = entries - first;
  return {first, left <= 0 ? 0 : left < kThreadEntries ? static_cast<int>(left) : kThreadEntries};
}
__device__ __forceinline__ EntryRange entries_of_thread(int64_t entries) {
  return entries_of_thread(entries, blockIdx.x);
}

inline Grid grid_of_entries(int64_t entries) {
  constexpr int64_t kBlock = kEntryThreads * kThreadEntries;
  return {.x = (entries + kBlock - 1) / kBlock, .threads = kEntryThreads};
}

// One number per entry, contiguous.
struct Stream {
  void* data;
  DType dtype;
  bool vectors;  // whether four neighbors can be read and written at once
};

inline Stream stream_of(const Tensor& tensor, void* data) {
  const auto bytes = static_cast<uintptr_t>(tensor.element_size()) * kThreadEntries;
  return {data, dtype_of(tensor.scalar_type()), reinterpret_cast<uintptr_t>(data) % bytes == 0};
}
inline Stream stream_of(const Tensor& tensor) { return stream_of(tensor, const_cast<void*>(tensor.const_data_ptr())); }

// Four numbers as they are in memory: a word each in float, half a word else.
struct PackedEntries {
  uint32_t words[kThreadEntries];
};

__device__ __forceinline__ PackedEntries load_packed(const Stream& stream, const EntryRange& range) {
  PackedEntries packed = {};
  if (stream.dtype == DType::float32) {
    const uint32_t* from = static_cast<const uint32_t*>(stream.data) + range.first;
    if (stream.vectors && range.count == kThreadEntries) {
      const uint4 four = *reinterpret_cast<const uint4*>(from);
      return {{four.x, four.y, four.z, four.w}};
    }
#pragma unroll
    for (int i = 0; i < kThreadEntries; ++i) packed.words[i] = i < range.count ? from[i] : 0;
    return packed;
  }
  const uint16_t* from = static_cast<const uint16_t*>(stream.data) + range.first;
  if (stream.vectors && range.count == kThreadEntries) {
    const uint2 four = *reinterpret_cast<const uint2*>(from);
    return {{four.x, four.y}};
  }
#pragma unroll
  for (int i = 0; i < kThreadEntries; ++i) packed.words[i / 2] |= (i < range.count ? from[i] : 0u) << i % 2 * 16;
  return packed;
}

__device__ __forceinline__ void store_packed(
    const Stream& stream, const EntryRange& range, const PackedEntries& packed) {
  if (stream.dtype == DType::float32) {
    uint32_t* to = static_cast<uint32_t*>(stream.data) + range.first;
    if (stream.vectors && range.count == kThreadEntries) {
      *reinterpret_cast<uint4*>(to) = make_uint4(packed.words[0], packed.words[1], packed.words[2], packed.words[3]);
      return;
    }
#pragma unroll
    for (int i = 0; i < kThreadEntries; ++i) {
      if (i < range.count) to[i] = packed.words[i];
    }
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(stream.data) + range.first;
  if (stream.vectors && range.count == kThreadEntries) {
    *reinterpret_cast<uint2*>(to) = make_uint2(packed.words[0], packed.words[1]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kThreadEntries; ++i) {
    if (i < range.count) to[i] = static_cast<uint16_t>(packed.words[i / 2] >> i % 2 * 16);
  }
}

__device__ __forceinline__ void unpack(const PackedEntries& packed, DType dtype, float (&numbers)[kThreadEntries]) {
  if (dtype == DType::float32) {
#pragma unroll
    for (int i = 0; i < kThreadEntries; ++i) numbers[i] = __uint_as_float(packed.words[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kThreadEntries; ++i) {
    const auto bits = static_cast<uint16_t>(packed.words[i / 2] >> i % 2 * 16);
    numbers[i] = dtype == DType::bfloat16 ? static_cast<float>(BFloat16(bits, BFloat16::from_bits()))
                                          : static_cast<float>(Half(bits, Half::from_bits()));
  }
}

__device__ __forceinline__ PackedEntries pack(DType dtype, const float (&numbers)[kThreadEntries]) {
  PackedEntries packed = {};
  if (dtype == DType::float32) {
#pragma unroll
    for (int i = 0; i < kThreadEntries; ++i) packed.words[i] = __float_as_uint(numbers[i]);
    return packed;
  }
#pragma unroll
  for (int i = 0; i < kThreadEntries; ++i) {
    const uint32_t bits =
        dtype == DType::bfloat16 ? static_cast<BFloat16>(numbers[i]).x : static_cast<Half>(numbers[i]).x;
    packed.words[i / 2] |= bits << i % 2 * 16;
  }
  return packed;
}

// The entries as they are, each to a place of its own.
__device__ __forceinline__ void store_bits(
    void* to, DType dtype, const EntryRange& range, const int64_t (&positions)[kThreadEntries],
    const PackedEntries& packed) {
#pragma unroll
  for (int i = 0; i < kThreadEntries; ++i) {
    if (i >= range.count) continue;
    if (dtype == DType::float32) {
      static_cast<uint32_t*>(to)[positions[i]] = packed.words[i];
    } else {
      static_cast<uint16_t*>(to)[positions[i]] = static_cast<uint16_t>(packed.words[i / 2] >> i % 2 * 16);
    }
  }
}

// Four positions of a contiguous list.
__device__ __forceinline__ void load_positions(
    const IndicesView& indices, bool vectors, const EntryRange& range, int64_t (&positions)[kThreadEntries]) {
  if (!vectors || range.count < kThreadEntries) {
#pragma unroll
    for (int i = 0; i < kThreadEntries; ++i) positions[i] = i < range.count ? indices[range.first + i] : 0;
    return;
  }
  if (!indices.wide) {
    const int4 four = *reinterpret_cast<const int4*>(static_cast<const int32_t*>(indices.data) + range.first);
    positions[0] = four.x;
    positions[1] = four.y;
    positions[2] = four.z;
    positions[3] = four.w;
    return;
  }
  const auto* pairs = reinterpret_cast<const uint4*>(static_cast<const int64_t*>(indices.data) + range.first);
#pragma unroll
  for (int i = 0; i < kThreadEntries / 2; ++i) {
    const uint4 two = pairs[i];
    positions[2 * i] = static_cast<int64_t>(two.x | uint64_t{two.y} << 32);
    positions[2 * i + 1] = static_cast<int64_t>(two.z | uint64_t{two.w} << 32);
  }
}

// Where the numbers of a delta go: weight[indices].
struct DeltaTarget {
  void* weight;  // null: nowhere
  DType dtype;   // of weight and of what stood there before
  IndicesView indices;
  bool index_vectors;
};

inline DeltaTarget target_of(const Tensor& weight, const Tensor& indices) {
  return {
      weight.mutable_data_ptr(), dtype_of(weight.scalar_type()), indices_view(indices),
      reinterpret_cast<uintptr_t>(indices.const_data_ptr()) % 16 == 0};
}

__device__ __forceinline__ void load_positions(
    const DeltaTarget& target, const EntryRange& range, int64_t (&positions)[kThreadEntries]) {
  load_positions(target.indices, target.index_vectors, range, positions);
}

// weight = before + factor delta, rounded after the product, the sum and once to weight's type, as the definition does.
__device__ __forceinline__ void write_sums(
    const DeltaTarget& target, const EntryRange& range, const int64_t (&positions)[kThreadEntries],
    const float (&before)[kThreadEntries], float factor, const float (&delta)[kThreadEntries]) {
#pragma unroll
  for (int i = 0; i < kThreadEntries; ++i) {
    if (i >= range.count) continue;
    store_float(target.weight, positions[i], target.dtype, __fadd_rn(before[i], __fmul_rn(factor, delta[i])));
  }
}

}  // namespace peft_kernels
