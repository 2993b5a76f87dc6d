// Block scores for one instruction set. Compiled once per capability with -DPK_CAPABILITY=<name>; see simd.h.
//
// Both operands are cast to the accumulation dtype as they are packed: keys [D][kRegion], queries [kRegion][D]. A tile
// of kRows queries by kVectors vectors of keys stays in registers over the depth of a head, and is added to the scores
// in the first cache where it is positive. Multiply-adds bound it.
#include "token_selection_kernels.h"
#include "chunk.h"

#if !defined(PK_CAPABILITY)
#error "compile with -DPK_CAPABILITY=baseline|avx2|avx512"
#endif

namespace peft_kernels {
namespace {

constexpr int kRows = kVectorBytes == 64 ? 8 : 4;
constexpr int kVectors = 2;

template <typename acc>
int64_t packed_bytes(int64_t depth) {
  return kRegion * depth * static_cast<int64_t>(sizeof(acc));
}

// Numbers [begin, begin + count) of one token in the accumulation dtype; count is at most kChunk.
template <typename T, typename acc>
inline void load_numbers(const HeadTokens& from, int64_t token, int64_t begin, int64_t count, acc* to) {
  const T* at = static_cast<const T*>(from.data) + token * from.token_stride + begin * from.depth_stride;
  if (from.depth_stride == 1) return convert(at, to, count);
  T numbers[kChunk];
  for (int64_t d = 0; d < count; ++d) numbers[d] = at[d * from.depth_stride];
  convert(numbers, to, count);
}

template <typename T>
void pack_queries(const HeadTokens& from, void* to) {
  using acc = typename Accumulate<T>::type;
  acc* rows = static_cast<acc*>(to);
  for (int64_t i = 0; i < from.tokens; ++i, rows += from.depth) {
    for (int64_t d = 0; d < from.depth; d += kChunk) {
      load_numbers<T>(from, i, d, smaller(kChunk, from.depth - d), rows + d);
    }
  }
  std::memset(rows, 0, sizeof(acc) * (kRegion - from.tokens) * from.depth);
}

template <typename T>
void pack_keys(const HeadTokens& from, void* to) {
  using acc = typename Accumulate<T>::type;
  acc* columns = static_cast<acc*>(to);
  if (from.tokens < kRegion) std::memset(columns, 0, packed_bytes<acc>(from.depth));
  acc numbers[kChunk];
  for (int64_t j = 0; j < from.tokens; ++j) {
    for (int64_t begin = 0; begin < from.depth; begin += kChunk) {
      const int64_t count = smaller(kChunk, from.depth - begin);
      load_numbers<T>(from, j, begin, count, numbers);
      for (int64_t d = 0; d < count; ++d) columns[(begin + d) * kRegion + j] = numbers[d];
    }
  }
}

// A NaN is not less than zero.
template <typename V>
inline V positive(V value) {
  return value < 0 ? V{} : value;
}

template <typename acc>
inline void multiply_tile(const acc* queries, const acc* keys, int64_t depth, bool first, acc* scores) {
  constexpr int lanes = kLanes<acc>;
  Vector<acc> sum[kRows][kVectors] = {};
  for (int64_t d = 0; d < depth; ++d, keys += kRegion) {
    Vector<acc> k[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) k[v] = load_vector(keys + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vector<acc> q = splat(queries[i * depth + d]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] += q * k[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      acc* to = scores + i * kRegion + v * lanes;
      const Vector<acc> value = positive(sum[i][v]);
      store_vector(to, first ? value : load_vector(to) + value);
    }
  }
}

template <typename acc>
void multiply(const void* queries, const void* keys, const RegionHeads& of, int64_t rows, void* scores) {
  constexpr int64_t width = kVectors * kLanes<acc>;
  const acc *q = static_cast<const acc*>(queries), *k = static_cast<const acc*>(keys);
  const int64_t head = kRegion * of.depth, group = of.heads / of.key_value_heads;
  acc* to = static_cast<acc*>(scores);
  if (of.heads == 0) std::memset(to, 0, sizeof(acc) * kRegion * kRegion);
  for (int64_t j = 0; j < kRegion; j += width) {
    for (int64_t i = 0; i < rows; i += kRows) {
      for (int64_t h = 0; h < of.heads; ++h) {
        multiply_tile(q + h * head + i * of.depth, k + h / group * head + j, of.depth, h == 0, to + i * kRegion + j);
      }
    }
  }
}

template <typename acc>
void maxima(const void* scores, int64_t rows, const int32_t* first, const int32_t* last, void* largest) {
  using V = Vector<acc>;
  using Mask = typename VectorOf<acc>::mask;
  constexpr int lanes = kLanes<acc>;
  for (int64_t j = 0; j < kRegion; j += lanes) {
    const acc* from = static_cast<const acc*>(scores) + j;
    Mask column = Mask{} + static_cast<int32_t>(j);
    for (int lane = 0; lane < lanes; ++lane) column[lane] += lane;
    V most = {};
    for (int64_t i = 0; i < rows; ++i, from += kRegion) {
      const Mask seen = (column >= Mask{} + first[i]) & (column < Mask{} + last[i]);
      const V value = (V)((Mask)load_vector(from) & seen);
      most = (value <= most) | (most != most) ? most : value;  // a NaN replaces a number and stays
    }
    store_vector(static_cast<acc*>(largest) + j, most);
  }
}

template <typename T>
constexpr BlockScoresKernel block_scores() {
  using acc = typename Accumulate<T>::type;
  return {packed_bytes<acc>, packed_bytes<acc>, pack_queries<T>, pack_keys<T>, multiply<acc>, maxima<acc>};
}

}  // namespace

#define PK_CONCATENATE(a, b) a##b
#define PK_TABLE_NAME(capability) PK_CONCATENATE(token_selection_kernels_, capability)

const TokenSelectionKernels PK_TABLE_NAME(PK_CAPABILITY) = {
    {block_scores<float>(), block_scores<bf16>(), block_scores<fp16>(), block_scores<double>()}};

}  // namespace peft_kernels
