// values = (grad_out [M, N]^T x [M, K]) at sorted flat positions, a dot product each, for entries that are rare.
//
// A column of a matrix that lies row by row costs a sector of 32 bytes per element. So both matrices are transposed
// first, a slab of at most 1024 tokens at a time: what was a column is a run of 2 KB then, read 512 bytes at a time by
// a warp, and the slabs of layers up to some 12000 wide in all, e (N + K) KB, stay in the L2 of a large GPU. Bytes: x
// and grad_out once from memory, written and read e M (N + K) more in L2; per entry e M of x, and as much of grad_out,
// which neighbors in a row find in L1. FLOP: 2 M per entry, on the CUDA cores. At 4096 x 14336, M = 4096, a density of
// 0.1% and 16 bits that is 0.15 GB from memory, 0.3 GB and 0.5 to 1 GB out of L2 and 0.5 GFLOP, against 481 GFLOP of
// tiles.
//
// Why not out of shared memory, without scratch: tiles of 128 x 128 hold 16 entries at that density, 32 of 256 columns,
// so that eight times as much would be read as is used.
#include <cuda_runtime.h>
#include <launch.cuh>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <type_traits>

#include "dtypes.h"
#include "indices.h"
#include "sampled_product.h"
#include "views.h"

namespace peft_kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kLanes;
constexpr int64_t kSlabTokens = 1024;

template <typename T>
constexpr int kChunk = kChunkBytes / sizeof(T);

template <typename T>
struct alignas(kChunkBytes) Chunk {
  T values[kChunk<T>];
};

// --- slab [columns, pitch] = rows [first, first + tokens) of matrix, transposed; the rest of a run is zero ---

struct TransposeArguments {
  const void* matrix;
  void* slab;
  int64_t first, tokens, columns, pitch;
  int64_t row_stride, column_stride;
  bool vectors;
};

constexpr int kTileTokens = 64;

// A block takes 64 tokens of eight chunks of columns. It reads chunks along the rows and writes them along the tokens;
// in between they cross shared memory, whose odd pitch in words keeps both sides at two accesses to a bank at most.
template <typename Bits>
__global__ void __launch_bounds__(kThreads) transpose_slab_kernel(const __grid_constant__ TransposeArguments a) {
  constexpr int kChunks = 8, kColumns = kChunks * kChunk<Bits>, kPitch = kTileTokens + 4 / sizeof(Bits);
  __shared__ uint32_t words[kColumns * kPitch * sizeof(Bits) / 4];
  auto* staged = reinterpret_cast<Bits*>(words);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first_token = int64_t{blockIdx.y} * kTileTokens, first_column = int64_t{blockIdx.x} * kColumns;
  const Bits* matrix = static_cast<const Bits*>(a.matrix) + a.first * a.row_stride;
  const int column = thread % kChunks * kChunk<Bits>;
  Chunk<Bits> chunks[kTileTokens * kChunks / kThreads];
#pragma unroll
  for (int i = 0; i < kTileTokens * kChunks / kThreads; ++i) {
    const int64_t m = first_token + thread / kChunks + i * (kThreads / kChunks), c = first_column + column;
    chunks[i] = {};
    if (m >= a.tokens) continue;
    const Bits* from = matrix + m * a.row_stride + c * a.column_stride;
    if (a.vectors && c + kChunk<Bits> <= a.columns) {
      chunks[i] = *reinterpret_cast<const Chunk<Bits>*>(from);
    } else {
#pragma unroll
      for (int j = 0; j < kChunk<Bits>; ++j) {
        if (c + j < a.columns) chunks[i].values[j] = from[j * a.column_stride];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTileTokens * kChunks / kThreads; ++i) {
    const int token = thread / kChunks + i * (kThreads / kChunks);
#pragma unroll
    for (int j = 0; j < kChunk<Bits>; ++j) staged[(column + j) * kPitch + token] = chunks[i].values[j];
  }
  __syncthreads();
  constexpr int kRuns = kTileTokens / kChunk<Bits>;  // chunks of tokens
#pragma unroll
  for (int index = thread; index < kColumns * kRuns; index += kThreads) {
    const int64_t c = first_column + index / kRuns, m = first_token + index % kRuns * kChunk<Bits>;
    if (c >= a.columns || m >= a.pitch) continue;
    const uint32_t* from = words + (index / kRuns * kPitch + index % kRuns * kChunk<Bits>)*sizeof(Bits) / 4;
    static_cast<uint4*>(a.slab)[(c * a.pitch + m) / kChunk<Bits>] = make_uint4(from[0], from[1], from[2], from[3]);
  }
}

// --- out = before + the dot products of the entries' runs ---

struct DotsArguments {
  const void *grad_out, *x;  // slabs [N, pitch], [K, pitch]
  int64_t pitch;             // a multiple of the chunk
  int64_t columns;           // K
  bool narrow;               // whether positions fit 32 bits
  IndicesView indices;
  int64_t entries;
  const float* before;  // null in the first slab
  void* out;
  DType dtype;
};

constexpr int kWarpEntries = 4;

__device__ __forceinline__ int64_t row_of(const DotsArguments& a, int64_t position) {
  return a.narrow ? static_cast<uint32_t>(position) / static_cast<uint32_t>(a.columns) : position / a.columns;
}

// A warp takes four neighboring entries at once, a lane every 32nd chunk of their runs: eight reads of 16 bytes are
// under way together. The order of additions is that of the tokens of a lane, then of the lanes.
template <typename Element>
__global__ void __launch_bounds__(kThreads) sampled_dots_kernel(const __grid_constant__ DotsArguments a) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes) * kWarpEntries;
  if (first >= a.entries) return;
  const int64_t own = first + lane % kWarpEntries;
  const int64_t position = a.indices[own < a.entries ? own : a.entries - 1];
  const int64_t row = row_of(a, position), column = position - row * a.columns;
  const Element *left[kWarpEntries], *right[kWarpEntries];
#pragma unroll
  for (int i = 0; i < kWarpEntries; ++i) {
    left[i] = static_cast<const Element*>(a.grad_out) + __shfl_sync(~0u, row, i) * a.pitch;
    right[i] = static_cast<const Element*>(a.x) + __shfl_sync(~0u, column, i) * a.pitch;
  }
  float sums[kWarpEntries] = {};
#pragma unroll 1
  for (int64_t m = lane * kChunk<Element>; m < a.pitch; m += kLanes * kChunk<Element>) {
    Chunk<Element> grad_out[kWarpEntries], x[kWarpEntries];
#pragma unroll
    for (int i = 0; i < kWarpEntries; ++i) {
      grad_out[i] = *reinterpret_cast<const Chunk<Element>*>(left[i] + m);
      x[i] = *reinterpret_cast<const Chunk<Element>*>(right[i] + m);
    }
#pragma unroll
    for (int i = 0; i < kWarpEntries; ++i) {
#pragma unroll
      for (int j = 0; j < kChunk<Element>; ++j) {
        sums[i] = fmaf(static_cast<float>(grad_out[i].values[j]), static_cast<float>(x[i].values[j]), sums[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kWarpEntries; ++i) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      sums[i] += __shfl_xor_sync(~0u, sums[i], distance);
    }
  }
  float sum = sums[0];
#pragma unroll
  for (int i = 1; i < kWarpEntries; ++i) sum = lane == i ? sums[i] : sum;
  if (lane >= kWarpEntries || own >= a.entries) return;
  if (a.before != nullptr) sum += a.before[own];
  store_float(a.out, own, a.dtype, sum);
}

int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Tokens [first, first + tokens) of a matrix [M, C] as slab [C, pitch].
template <typename Element>
void start_transpose(
    const char* operation, const char* name, const Tensor& matrix, int64_t first, int64_t tokens, const Tensor& slab) {
  using Bits = std::conditional_t<sizeof(Element) == 4, uint32_t, uint16_t>;
  TransposeArguments a = {};
  a.matrix = matrix.const_data_ptr();
  a.slab = slab.mutable_data_ptr();
  a.first = first;
  a.tokens = tokens;
  a.columns = matrix.size(1);
  a.pitch = slab.size(1);
  a.row_stride = matrix.stride(0);
  a.column_stride = matrix.stride(1);
  a.vectors = allows_vectors(a.matrix, a.row_stride, a.column_stride, matrix.element_size());
  const Grid grid = {
      .x = divide_up(a.columns, 8 * kChunk<Element>), .y = divide_up(a.pitch, kTileTokens), .threads = kThreads};
  launch(operation, grid, transpose_slab_kernel<Bits>, a, {{name, matrix}, {"slab", slab, Access::write}});
}

template <typename Element>
void start(const char* operation, const Tensor& out, const Tensor& grad_out, const Tensor& x, const Tensor& indices) {
  const int64_t depth = x.size(0), slabs = divide_up(depth, kSlabTokens), entries = out.numel();
  const int64_t tokens = divide_up(depth, slabs), pitch = divide_up(tokens, kChunk<Element>) * kChunk<Element>;
  const Tensor left = torch::stable::new_empty(grad_out, {grad_out.size(1), pitch});
  const Tensor right = torch::stable::new_empty(x, {x.size(1), pitch});
  const bool in_place = slabs == 1 || out.scalar_type() == ScalarType::Float;
  const Tensor sums = in_place ? out : torch::stable::new_empty(out, {entries}, ScalarType::Float);
  DotsArguments a = {};
  a.grad_out = left.const_data_ptr();
  a.x = right.const_data_ptr();
  a.pitch = pitch;
  a.columns = x.size(1);
  a.narrow = grad_out.size(1) * a.columns <= int64_t{1} << 32;
  a.indices = indices_view(indices);
  a.entries = entries;
  const Grid grid = {.x = divide_up(entries, kWarps * kWarpEntries), .threads = kThreads};
  for (int64_t slab = 0; slab < slabs; ++slab) {
    const int64_t first = slab * tokens, count = depth - first < tokens ? depth - first : tokens;
    start_transpose<Element>(operation, "grad_out", grad_out, first, count, left);
    start_transpose<Element>(operation, "x", x, first, count, right);
    const Tensor& target = slab + 1 == slabs ? out : sums;
    a.before = slab == 0 ? nullptr : static_cast<const float*>(sums.const_data_ptr());
    a.out = target.mutable_data_ptr();
    a.dtype = dtype_of(target.scalar_type());
    launch(
        operation, grid, sampled_dots_kernel<Element>, a,
        {{"grad_out", left},
         {"x", right},
         {"indices", indices},
         {"sums", sums, Access::write},
         {"out", target, Access::write}});
  }
}

}  // namespace

void start_sampled_dots(
    const char* operation, const Tensor& out, const Tensor& grad_out, const Tensor& x, const Tensor& indices) {
  with_element_type(
      dtype_of(x.scalar_type()), [&](auto element) { start<decltype(element)>(operation, out, grad_out, x, indices); });
}

}  // namespace peft_kernels
