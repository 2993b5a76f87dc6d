// Block scores of bfloat16 queries and keys on matrix tiles (AMX).
//
// Queries are left operands, [kRegion][depth] with zeros up to a multiple of 32; keys are right operands, transposed
// once: [4 tiles of 16 keys][steps of 32 numbers]. Two by two tiles hold a head's 32 x 32 scores, which pass by the
// first cache to be added where they are positive: that takes about as long as the product itself at a depth of 64.
#include "amx_tiles.h"
#include "token_selection_kernels.h"

namespace peft_kernels {
namespace {

constexpr int64_t kHalf = kRegion / 2;
constexpr int64_t kSums = 4 * kTile * kTile;

int64_t packed_bytes(int64_t depth) { return kRegion * round_up(depth, kDepth) * 2; }

// Numbers [begin, begin + 32) of one token, zeros behind the last.
inline __m512i load_numbers(const HeadTokens& from, int64_t token, int64_t begin) {
  const uint16_t* at = static_cast<const uint16_t*>(from.data) + token * from.token_stride + begin * from.depth_stride;
  const int64_t count = smaller(kDepth, from.depth - begin);
  if (from.depth_stride == 1) return _mm512_maskz_loadu_epi16(first_columns(count), at);
  alignas(64) uint16_t numbers[kDepth] = {};
  for (int64_t d = 0; d < count; ++d) numbers[d] = at[d * from.depth_stride];
  return _mm512_load_si512(numbers);
}

void pack_queries(const HeadTokens& from, void* to) {
  uint16_t* row = static_cast<uint16_t*>(to);
  const int64_t width = round_up(from.depth, kDepth);
  for (int64_t i = 0; i < from.tokens; ++i, row += width) {
    for (int64_t d = 0; d < width; d += kDepth) _mm512_store_si512(row + d, load_numbers(from, i, d));
  }
  std::memset(row, 0, (kRegion - from.tokens) * width * 2);
}

void pack_keys(const HeadTokens& from, void* to) {
  uint16_t* tile = static_cast<uint16_t*>(to);
  alignas(64) uint16_t rows[kTile * kDepth];
  for (int64_t j = 0; j < kRegion; j += kTile) {
    for (int64_t d = 0; d < from.depth; d += kDepth, tile += kTileWords) {
      for (int64_t i = 0; i < kTile; ++i) {
        const bool exists = j + i < from.tokens;
        _mm512_store_si512(rows + i * kDepth, exists ? load_numbers(from, j + i, d) : _mm512_setzero_si512());
      }
      transpose_entries(rows, kDepth * 2, tile);
    }
  }
}

// sums [2][2][16][16] of 32 queries, rows `width` apart, and two tiles of keys, `key_stride` apart.
inline void multiply_head(
    const uint16_t* queries, int64_t width, const uint16_t* keys, int64_t key_stride, float* sums) {
  zero_sums();
  for (int64_t d = 0; d < width; d += kDepth, keys += kTileWords) {
    tile_load<6>(keys, 64);
    tile_load<4>(queries + d, width * 2);
    tile_multiply<0, 4, 6>();
    tile_load<7>(keys + key_stride, 64);
    tile_multiply<1, 4, 7>();
    tile_load<5>(queries + kTile * width + d, width * 2);
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
  store_sums(sums, kTile * kTile, kTile);
}

// Where one is NaN, the maximum is the second operand.
inline __m512 positive(const float* sums) { return _mm512_max_ps(_mm512_setzero_ps(), _mm512_load_ps(sums)); }

inline void add_positive(const float* sums, bool first, float* scores) {
  for (int64_t i = 0; i < kHalf; ++i) {
    const float* row = sums + i / kTile * 2 * kTile * kTile + i % kTile * kTile;
    float* to = scores + i * kRegion;
    const __m512 low = positive(row), high = positive(row + kTile * kTile);
    _mm512_storeu_ps(to, first ? low : _mm512_add_ps(_mm512_loadu_ps(to), low));
    _mm512_storeu_ps(to + kTile, first ? high : _mm512_add_ps(_mm512_loadu_ps(to + kTile), high));
  }
}

void multiply(const void* queries, const void* keys, const RegionHeads& of, int64_t rows, void* scores) {
  const TileScope scope;
  const int64_t width = round_up(of.depth, kDepth), head = kRegion * width, group = of.heads / of.key_value_heads;
  const uint16_t *q = static_cast<const uint16_t*>(queries), *k = static_cast<const uint16_t*>(keys);
  float* to = static_cast<float*>(scores);
  if (of.heads == 0) std::memset(to, 0, sizeof(float) * kRegion * kRegion);
  // Two heads are under way, so that the sums of one are stored while those of the other are read.
  alignas(64) float sums[2][kSums];
  for (int64_t j = 0; j < kRegion; j += kHalf) {
    for (int64_t i = 0; i < rows; i += kHalf) {
      float* corner = to + i * kRegion + j;
      for (int64_t h = 0; h < of.heads; ++h) {
        multiply_head(q + h * head + i * width, width, k + h / group * head + j * width, kTile * width, sums[h % 2]);
        if (h > 0) add_positive(sums[(h - 1) % 2], h == 1, corner);
      }
      if (of.heads > 0) add_positive(sums[(of.heads - 1) % 2], of.heads == 1, corner);
    }
  }
}

}  // namespace

const BlockScoresKernel block_scores_amx_bf16 = {packed_bytes, packed_bytes, pack_queries,
                                                 pack_keys,    multiply,     nullptr};

}  // namespace peft_kernels
