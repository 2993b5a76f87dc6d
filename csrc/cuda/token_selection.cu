// The tokens of the blocks of tokens with the largest scores, sorted, without a word to the host. Formulas in
// peft_kernels/reference/token_selection.py.
//
// A block of threads takes a sequence. The count-th largest score is found digit by digit as in outer_product_topk.cu:
// three rounds of a histogram of 11 bits of the scores' keys, whose order is theirs. Then one pass in the order of the
// sequence counts what lies above that score and what equals it, so that each kept block knows its place. A second
// kernel writes the tokens.
//
// Scores are read four times and their keys formed anew each time: 64 KB of them, 16384 blocks, stay in L1, more in L2,
// and no length is a special case. Bytes: 4 n scores per sequence and 4 per kept token; at 128K tokens in blocks of 64,
// 2048 scores, there is nothing to bound but the chain of some twenty barriers and as many reads, about 20 us; single
// tokens, 131072 scores, take 128 steps of each of four passes, about 100 us [calculated]. Sequences run side by side.
#include <cuda_runtime.h>
#include <launch.cuh>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../common/token_selection_checks.h"
#include "slice_entries.h"
#include "tile.h"

namespace peft_kernels {
namespace {

constexpr bool kTakesFloat64 = false;
constexpr int kThreads = 1024, kWarps = kThreads / kLanes;

// Digits of the 32 bits of a key, the highest first.
constexpr int kRounds = 3, kDigitBits = 11, kDigits = 1 << kDigitBits, kLastDigitBits = 10;

// Keys have the order of the scores. Both zeros are one, and so are all NaNs, which are the largest.
__device__ __forceinline__ uint32_t key_of(float score) {
  constexpr uint32_t kSign = 0x80000000u, kInfinity = 0x7F800000u;
  const uint32_t bits = __float_as_uint(score);
  if ((bits & ~kSign) > kInfinity) return ~0u;
  if (bits == kSign) return kSign;
  return bits & kSign ? ~bits : bits | kSign;
}

struct ChooseArguments {
  const float* scores;
  int64_t row_stride, column_stride;
  int64_t total;             // scores of a sequence
  unsigned wanted;           // blocks, at most all of them
  int64_t block_size, tail;  // tokens
  const float* threshold;    // null without
  int32_t* chosen;           // [B, wanted]: blocks in order; behind the last one nothing is written
  int32_t* counts;           // [B], tokens
};

// Keys above `above` are kept, and the first `ties` of those equal to it.
struct Cut {
  uint32_t above;
  unsigned ties;
};

// What is known of the wanted-th largest key: its upper digits, and its rank among the keys that share them.
struct Prefix {
  uint32_t digits;
  unsigned rank;
};

// The first warp finds the digit in which the rank falls; each lane has neighboring digits, the first lane the largest.
__device__ __forceinline__ void choose_digit(const unsigned* counts, int digits, int digit_bits, Prefix& prefix) {
  const int lane = static_cast<int>(threadIdx.x), own_digits = digits / kLanes, top = digits - 1 - lane * own_digits;
  unsigned own = 0;
  for (int i = 0; i < own_digits; ++i) own += counts[top - i];
  unsigned through = own;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const unsigned other = __shfl_up_sync(~0u, through, distance);
    if (lane >= distance) through += other;
  }
  const Prefix before = prefix;
  __syncwarp();  // all have read it
  unsigned above = through - own;
  if (above < before.rank && before.rank <= through) {
    int digit = top;
    while (above + counts[digit] < before.rank) above += counts[digit--];
    prefix = {before.digits << digit_bits | static_cast<uint32_t>(digit), before.rank - above};
  }
}

__device__ __forceinline__ Cut find_cut(const ChooseArguments& a, const float* scores) {
  __shared__ unsigned counts[kDigits];
  __shared__ Prefix prefix;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) prefix = {0, a.wanted};
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    const int digit_bits = round + 1 < kRounds ? kDigitBits : kLastDigitBits;
    const int upper = 32 - round * kDigitBits, shift = upper - digit_bits;
    for (int digit = thread; digit < kDigits; digit += kThreads) counts[digit] = 0;
    __syncthreads();
    const uint32_t digits = prefix.digits;
    for (int64_t block = thread; block < a.total; block += kThreads) {
      const uint32_t key = key_of(scores[block * a.column_stride]);
      // Of 32 bits nothing may be shifted out at once.
      const bool shares = round == 0 || key >> upper == digits;
      if (shares) atomicAdd(counts + (key >> shift & ((1u << digit_bits) - 1)), 1u);
    }
    __syncthreads();
    if (thread < kLanes) choose_digit(counts, 1 << digit_bits, digit_bits, prefix);
    __syncthreads();
  }
  Cut cut = {prefix.digits, prefix.rank};
  if (a.threshold != nullptr) {
    const uint32_t least = key_of(*a.threshold);
    if (least > cut.above) cut = {least - 1, 0};  // at least as large is above the one before
  }
  return cut;
}

__global__ void __launch_bounds__(kThreads) choose_blocks_kernel(const __grid_constant__ ChooseArguments a) {
  __shared__ unsigned above_of_warps[kWarps], ties_of_warps[kWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const float* scores = a.scores + int64_t{blockIdx.x} * a.row_stride;
  int32_t* chosen = a.chosen + int64_t{blockIdx.x} * a.wanted;
  unsigned above = 0, ties = 0;  // in front of the blocks that are looked at
  Cut cut = {~0u, 0};
  if (a.wanted > 0) {
    cut = find_cut(a, scores);
#pragma unroll 1
    for (int64_t first = 0; first < a.total; first += kThreads) {
      const int64_t block = first + thread;
      const uint32_t key = block < a.total ? key_of(scores[block * a.column_stride]) : 0;
      const bool is_above = block < a.total && key > cut.above, is_tie = block < a.total && key == cut.above;
      const uint32_t lanes_above = __ballot_sync(~0u, is_above), lanes_ties = __ballot_sync(~0u, is_tie);
      if (lane == 0) {
        above_of_warps[warp] = static_cast<unsigned>(__popc(lanes_above));
        ties_of_warps[warp] = static_cast<unsigned>(__popc(lanes_ties));
      }
      __syncthreads();
      const uint32_t lanes_before = (1u << lane) - 1;
      unsigned own_above = above + __popc(lanes_above & lanes_before);
      unsigned own_ties = ties + __popc(lanes_ties & lanes_before);
#pragma unroll
      for (int other = 0; other < kWarps; ++other) {
        above += above_of_warps[other];
        ties += ties_of_warps[other];
        own_above += other < warp ? above_of_warps[other] : 0;
        own_ties += other < warp ? ties_of_warps[other] : 0;
      }
      __syncthreads();  // all have read them
      if (is_above || (is_tie && own_ties < cut.ties)) {
        chosen[own_above + min(own_ties, cut.ties)] = static_cast<int32_t>(block);
      }
    }
  }
  if (thread == 0) {
    a.counts[blockIdx.x] = static_cast<int32_t>((above + min(ties, cut.ties)) * a.block_size + a.tail);
  }
}

struct TokensArguments {
  const int32_t *chosen, *counts;
  int32_t* positions;  // [B, size]
  int64_t sequences, size;
  int64_t wanted, block_size, tail, first_tail;
  bool narrow;
};

constexpr int kTokenThreads = 256;

__global__ void __launch_bounds__(kTokenThreads) write_tokens_kernel(const __grid_constant__ TokensArguments a) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kTokenThreads + threadIdx.x;
  if (index >= a.sequences * a.size) return;
  const int64_t sequence = quotient(index, a.size, a.narrow), place = index - sequence * a.size;
  const int64_t count = a.counts[sequence], of_blocks = count - a.tail;
  int64_t position = -1;
  if (place < of_blocks) {
    const int64_t block = quotient(place, a.block_size, a.narrow);
    position = a.chosen[sequence * a.wanted + block] * a.block_size + place - block * a.block_size;
  } else if (place < count) {
    position = a.first_tail + place - of_blocks;
  }
  a.positions[index] = static_cast<int32_t>(position);
}

std::tuple<Tensor, Tensor> select_tokens(
    const Tensor& scores, int64_t tokens, int64_t blocks, int64_t block_size, std::optional<Tensor> threshold) {
  constexpr const char* op = "select_tokens";
  check_select_tokens(op, scores, tokens, blocks, block_size, threshold, kTakesFloat64);
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  const int64_t sequences = scores.size(0), total = scores.size(1), tail = tokens - total * block_size;
  const int64_t size = blocks * block_size + tail;
  Tensor positions = torch::stable::new_empty(scores, {sequences, size}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(scores, {sequences}, ScalarType::Int);
  if (sequences == 0) return {positions, counts};
  const Tensor chosen = torch::stable::new_empty(scores, {sequences, blocks}, ScalarType::Int);
  ChooseArguments a = {};
  a.scores = static_cast<const float*>(scores.const_data_ptr());
  a.row_stride = scores.stride(0);
  a.column_stride = scores.stride(1);
  a.total = total;
  a.wanted = static_cast<unsigned>(blocks);
  a.block_size = block_size;
  a.tail = tail;
  a.threshold = threshold.has_value() ? static_cast<const float*>(threshold->const_data_ptr()) : nullptr;
  a.chosen = static_cast<int32_t*>(chosen.mutable_data_ptr());
  a.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  launch(
      op, {.x = sequences, .threads = kThreads}, choose_blocks_kernel, a,
      {{"scores", scores},
       {"threshold", threshold.has_value() ? *threshold : scores},
       {"chosen", chosen, Access::write},
       {"counts", counts, Access::write}});
  if (positions.numel() == 0) return {positions, counts};
  TokensArguments b = {};
  b.chosen = a.chosen;
  b.counts = a.counts;
  b.positions = static_cast<int32_t*>(positions.mutable_data_ptr());
  b.sequences = sequences;
  b.size = size;
  b.wanted = blocks;
  b.block_size = block_size;
  b.tail = tail;
  b.first_tail = total * block_size;
  b.narrow = fits_32_bits(positions.numel() + kTokenThreads) && fits_32_bits(block_size);
  const Grid grid = {.x = (positions.numel() + kTokenThreads - 1) / kTokenThreads, .threads = kTokenThreads};
  launch(
      op, grid, write_tokens_kernel, b,
      {{"chosen", chosen}, {"counts", counts}, {"positions", positions, Access::write}});
  return {positions, counts};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) { m.impl("select_tokens", TORCH_BOX(&peft_kernels::select_tokens)); }
