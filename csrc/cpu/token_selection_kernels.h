// The raw-pointer kernels of block scores for one instruction set; token_selection.cpp blocks and threads them.
//
// The matrix of scores is formed a region of kRegion queries by kRegion keys at a time, all heads of it, and only its
// maxima leave the region.
#pragma once

#include <cstdint>

#include "lora_kernels.h"

namespace peft_kernels {

constexpr int64_t kRegion = 64;

// One head of up to kRegion tokens, any strides.
struct HeadTokens {
  const void* data;
  int64_t tokens;
  int64_t depth;
  int64_t token_stride;
  int64_t depth_stride;
};

struct RegionHeads {
  int64_t heads;
  int64_t key_value_heads;
  int64_t depth;
};

// For one dtype of queries and keys; `acc` is float, or double for double.
struct BlockScoresKernel {
  // Bytes of one head of kRegion packed queries, and of keys.
  int64_t (*query_bytes)(int64_t depth);
  int64_t (*key_bytes)(int64_t depth);
  // One head; tokens that do not exist are zeros.
  void (*pack_queries)(const HeadTokens& from, void* to);
  void (*pack_keys)(const HeadTokens& from, void* to);
  // The first `rows` rows, or some more, of scores [kRegion, kRegion] in acc = sum over heads of max(0, q k^T). Heads
  // of either operand lie one after the other.
  void (*multiply)(const void* queries, const void* keys, const RegionHeads& of, int64_t rows, void* scores);
  // largest[j] = max over rows i of scores[i, j] where first[i] <= j < last[i], at least zero; NaN if there is one.
  void (*maxima)(const void* scores, int64_t rows, const int32_t* first, const int32_t* last, void* largest);
};

struct TokenSelectionKernels {
  BlockScoresKernel scores[kDTypes];  // indexed by DType
};

extern const TokenSelectionKernels token_selection_kernels_baseline;
#if defined(__x86_64__)
extern const TokenSelectionKernels token_selection_kernels_avx2;
extern const TokenSelectionKernels token_selection_kernels_avx512;
// The same for bfloat16 on matrix tiles, without `maxima`.
extern const BlockScoresKernel block_scores_amx_bf16;
#endif

}  // namespace peft_kernels
