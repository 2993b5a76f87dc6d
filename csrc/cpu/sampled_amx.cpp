// The sampled product on matrix tiles, for bfloat16: tiles of grad_out^T x at the rate of the dense product, from which
// the entries are taken. The product itself is never written.
//
// x is laid out in pairs of rows (see amx_tiles.h), [column tiles][steps of 32 rows][2][16][16 pairs]; the transposed
// columns of grad_out are left operands as they are. Sums over a chunk of rows are formed in the tiles, so an element
// depends on its two columns alone.
#include "amx_tiles.h"
#include "sampled_kernels.h"

namespace peft_kernels {
namespace {

constexpr int64_t kStepWords = 2 * kTileWords;  // bfloat16 numbers of 32 columns and 32 rows

void lay_out(const Matrix& x, int64_t first, int64_t rows, int64_t begin, int64_t end, void* tiles) {
  const uint16_t* data = static_cast<const uint16_t*>(x.data) + first * x.row_stride;
  uint16_t* to = static_cast<uint16_t*>(tiles);
  const int64_t steps = divide_up(rows, kDepth);
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t c = begin; c < end; c += kTileColumns) {
      const __mmask32 exist = first_columns(end - c);
      uint16_t* block = to + ((c - begin) / kTileColumns * steps + step) * kStepWords;
      for (int64_t pair = 0; pair < kTile; ++pair) {
        const int64_t m = step * kDepth + 2 * pair;
        const uint16_t* from = data + m * x.row_stride + c;
        const __m512i even = _mm512_maskz_loadu_epi16(m < rows ? exist : 0, m < rows ? from : data);
        const __m512i odd =
            _mm512_maskz_loadu_epi16(m + 1 < rows ? exist : 0, m + 1 < rows ? from + x.row_stride : data);
        __m512i low, high;
        pair_words(even, odd, &low, &high);
        _mm512_store_si512(block + pair * kDepth, low);
        _mm512_store_si512(block + kTileWords + pair * kDepth, high);
      }
    }
  }
}

// product [32][32], rows `product_stride` apart, of 32 left columns and one column tile.
inline void multiply_tile(
    const uint16_t* left, int64_t stride, int64_t depth, const uint16_t* right, float* product,
    int64_t product_stride = kTileColumns) {
  zero_sums();
  for (int64_t m = 0; m < depth; m += kDepth, right += kStepWords) {
    tile_load<4>(left + m, stride * 2);
    tile_load<5>(left + kTile * stride + m, stride * 2);
    tile_load<6>(right, 64);
    tile_load<7>(right + kTileWords, 64);
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 4, 7>();
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
  tile_store<0>(product, product_stride * 4);
  tile_store<1>(product + kTile, product_stride * 4);
  tile_store<2>(product + kTile * product_stride, product_stride * 4);
  tile_store<3>(product + kTile * product_stride + kTile, product_stride * 4);
}

constexpr int32_t kNone = INT32_MAX;

// Up to 16 positions as columns, less `base`; kNone beyond `count`. What is cut off is the same in both.
inline __m512i columns_of(const int32_t* at, int64_t count, int64_t base) {
  const __mmask16 exist = first_floats(count);
  const __m512i values = _mm512_maskz_loadu_epi32(exist, at);
  return _mm512_mask_sub_epi32(_mm512_set1_epi32(kNone), exist, values, _mm512_set1_epi32(static_cast<int32_t>(base)));
}

inline __m512i columns_of(const int64_t* at, int64_t count, int64_t base) {
  const __mmask16 exist = first_floats(count);
  const __m256i low = _mm512_cvtepi64_epi32(_mm512_maskz_loadu_epi64(static_cast<__mmask8>(exist), at));
  const __m256i high = _mm512_cvtepi64_epi32(_mm512_maskz_loadu_epi64(static_cast<__mmask8>(exist >> 8), at + 8));
  const __m512i values = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  return _mm512_mask_sub_epi32(_mm512_set1_epi32(kNone), exist, values, _mm512_set1_epi32(static_cast<int32_t>(base)));
}

// Adds the entries that lie in columns [c, c + 32) of a row, from `entry` on, to their sums. Returns the column of the
// next entry; `entry` is then that one.
template <typename Index>
inline int32_t take_row(
    const float* row, int64_t c, const Index* indices, int64_t base, int64_t last, float* sums, int64_t& entry) {
  const __m512 low = _mm512_load_ps(row), high = _mm512_load_ps(row + 16);
  while (true) {
    const __m512i column = columns_of(indices + entry, last - entry, base);
    const __mmask16 here = _mm512_cmplt_epi32_mask(column, _mm512_set1_epi32(static_cast<int32_t>(c + kTileColumns)));
    const __m512 value = _mm512_permutex2var_ps(low, column, high);  // c is a multiple of 32
    float* to = sums + entry;
    _mm512_mask_storeu_ps(to, here, _mm512_add_ps(_mm512_maskz_loadu_ps(here, to), value));
    entry += __builtin_popcount(here);
    if (here != 0xFFFF) {
      const __m512i rest = _mm512_maskz_compress_epi32(static_cast<__mmask16>(~here), column);
      return _mm_cvtsi128_si32(_mm512_castsi512_si128(rest));
    }
  }
}

template <typename Index>
void multiply(const TileRows<Index>& block) {
  const TileScope scope;
  const uint16_t* tiles = static_cast<const uint16_t*>(block.tiles);
  const int64_t tile_words = block.depth * kTileColumns;
  alignas(64) float product[kTileRows * kTileColumns];
  alignas(64) int32_t column[kTileRows];  // of each row's next entry, in the block
  int64_t entry[kTileRows], last[kTileRows];
  for (int64_t i = 0; i < kTileRows; ++i) {
    column[i] = kNone;
    if (i >= block.rows) continue;
    entry[i] = block.starts[i * block.starts_step];
    last[i] = block.starts[i * block.starts_step + 1];
    if (entry[i] < last[i]) {
      column[i] = static_cast<int32_t>(block.indices[entry[i]] - block.base - i * block.base_step);
    }
  }
  for (int64_t c = 0; c < block.columns; c += kTileColumns) {
    const __m512i end = _mm512_set1_epi32(static_cast<int32_t>(c + kTileColumns));
    uint32_t rows = _mm512_cmplt_epi32_mask(_mm512_load_si512(column), end);
    rows |= static_cast<uint32_t>(_mm512_cmplt_epi32_mask(_mm512_load_si512(column + 16), end)) << 16;
    if (rows == 0) continue;
    multiply_tile(
        static_cast<const uint16_t*>(block.left), block.stride, block.depth, tiles + c / kTileColumns * tile_words,
        product);
    for (; rows != 0; rows &= rows - 1) {
      const int i = __builtin_ctz(rows);
      column[i] = take_row(
          product + i * kTileColumns, c, block.indices, block.base + i * block.base_step, last[i], block.sums,
          entry[i]);
    }
  }
}

constexpr int64_t kSumRows = 512;  // of M in one sum of the tiles

void multiply_all(
    const void* left_columns, int64_t stride, int64_t depth, const void* tiles, int64_t columns, float* product,
    int64_t product_stride) {
  const TileScope scope;
  const uint16_t* left = static_cast<const uint16_t*>(left_columns);
  alignas(64) float sums[kTileRows * kTileColumns];
  for (int64_t c = 0; c < columns; c += kTileColumns) {
    const uint16_t* right = static_cast<const uint16_t*>(tiles) + c * depth;
    multiply_tile(left, stride, smaller(depth, kSumRows), right, product + c, product_stride);
    for (int64_t m = kSumRows; m < depth; m += kSumRows) {
      multiply_tile(left + m, stride, smaller(depth - m, kSumRows), right + m * kTileColumns, sums);
      for (int64_t i = 0; i < kTileRows; ++i) {
        float* row = product + i * product_stride + c;
        for (int64_t part = 0; part < kTileColumns; part += 16) {
          const __m512 more = _mm512_load_ps(sums + i * kTileColumns + part);
          _mm512_storeu_ps(row + part, _mm512_add_ps(_mm512_loadu_ps(row + part), more));
        }
      }
    }
  }
}

}  // namespace

const SampledTiles sampled_tiles_bf16 = {lay_out, multiply<int32_t>, multiply<int64_t>, multiply_all};

}  // namespace peft_kernels
