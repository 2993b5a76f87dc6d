// Runs the CUDA kernels of the LoRA family on the CPU: the phases of csrc/cuda/lora_tile.h for every thread of every
// block, one after the other, with the end of each loop over the threads in the place of __syncthreads(). It tests
// indices, tails, strides and arithmetic; it cannot see races within a phase, which need a GPU and compute-sanitizer.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "../cuda/lora_tile.h"
#include "../cuda/mask_unit.h"

namespace peft_kernels {

template <typename Phase>
void for_each_thread(const Phase& phase) {
  for (int thread = 0; thread < kThreads; ++thread) phase(thread);
}

template <typename Out, typename Factor>
void accumulate_on_host(const AccumulateArguments& a) {
  std::vector<ThreadTile<Out>> tiles(kThreads);
  std::vector<Position> positions(kThreads);
  TileMemory shared;
  for (int64_t block = 0; block < accumulate_blocks(a.rows, a.columns); ++block) {
    for_each_thread([&](int thread) {
      positions[thread] = position_of(block, thread, a.columns);
      load_out(a, positions[thread], tiles[thread]);
    });
    for (int64_t first = 0; first < a.rank; first += kRankChunk) {
      std::memset(static_cast<void*>(&shared), 0xFF, sizeof(shared));  // NaN wherever no thread writes
      for_each_thread([&](int thread) {
        load_hidden(a, positions[thread], thread, first, shared);
        load_factor<Factor>(a, positions[thread], thread, first, shared);
      });
      for_each_thread([&](int thread) { multiply(thread, rank_depth(a, first), shared, tiles[thread]); });
    }
    for_each_thread([&](int thread) { store_out(a, positions[thread], tiles[thread]); });
  }
}

// keep [rows, columns], one byte per element. The vector's memory is 16-byte aligned, as operator new promises.
inline std::vector<uint8_t> dropout_mask_on_host(int64_t rows, int64_t columns, double dropout_p, RngState state) {
  std::vector<uint8_t> keep(rows * columns);
  const int64_t rng_state[2] = {state.seed, state.offset};
  const MaskArguments arguments = {keep.data(), rng_state, rows, columns, dropout_threshold(dropout_p)};
  const int64_t threads = divide_up(mask_units(rows, columns), kThreads) * kThreads;
  for (int64_t thread = 0; thread < threads; ++thread) write_mask_unit(arguments, thread);
  return keep;
}

}  // namespace peft_kernels
