// The tiles of slice_tiles.h (AMX).
//
// bfloat16 goes to the tiles as it is. A float32 number is the exact sum of three bfloat16 terms, and the six products
// of terms that matter at 24 bits are summed, as in gemm_amx.cpp.
//
// Two by two tiles of sums take a chunk of rows before they leave the registers. What bounds all this is the read of
// `many`, of which 32 columns are laid out at a time: a walk down a matrix in steps of a line or two, which the
// hardware's prefetchers do not follow. So a chunk of rows is asked for along its rows first, and is in the second
// cache then.
#include "amx_tiles.h"
#include "slice_tiles.h"

namespace peft_kernels {
namespace {

constexpr int64_t kBlockSums = 4 * kTile * kTile;  // [row tile][column tile][16][16]

struct Bf16 {
  using Number = uint16_t;
  static constexpr int kTerms = 1;
  static constexpr int64_t kChunkRows = 256;  // 16 KiB of 32 columns
};

struct F32 {
  using Number = float;
  static constexpr int kTerms = 3;
  static constexpr int64_t kChunkRows = 128;  // 24 KiB of 32 columns
};

// 32 numbers of one column, at the row of their terms' first tiles.
inline void pack_row(const uint16_t* from, int64_t, uint16_t* to) { _mm512_store_si512(to, _mm512_loadu_si512(from)); }

inline void pack_row(const float* from, int64_t count, uint16_t* to) {
  __m512i row[F32::kTerms];
  split_row<F32::kTerms>(load_first(from, count), load_first(from + kTile, count - kTile), row);
  for (int t = 0; t < F32::kTerms; ++t) _mm512_store_si512(to + t * 2 * kTileWords, row[t]);
}

template <typename T>
void pack(const void* columns, int64_t stride, int64_t depth, int64_t begin, int64_t end, const SliceColumns& to) {
  constexpr int64_t step_words = T::kTerms * 2 * kTileWords;
  uint16_t* tiles = to.tiles + begin / kSliceColumns * to.steps * step_words;
  for (int64_t j = 0; j < end - begin; ++j) {
    const typename T::Number* from = static_cast<const typename T::Number*>(columns) + j * stride;
    for (int64_t m = 0; m < depth; m += kDepth) {
      pack_row(from + m, depth - m, tiles + m / kDepth * step_words + j * kDepth);
    }
  }
}

// Two rows of 32 columns as the entries of two tiles of each term.
inline void lay_out_pair(const uint16_t* even, const uint16_t* odd, int64_t columns, uint16_t* to) {
  const __mmask32 exist = first_columns(columns);
  __m512i low, high;
  pair_words(
      _mm512_maskz_loadu_epi16(even == nullptr ? 0 : exist, even),
      _mm512_maskz_loadu_epi16(odd == nullptr ? 0 : exist, odd), &low, &high);
  _mm512_store_si512(to, low);
  _mm512_store_si512(to + kTileWords, high);
}

inline void lay_out_pair(const float* even, const float* odd, int64_t columns, uint16_t* to) {
  for (int64_t tile = 0; tile < 2; ++tile, columns -= kTile) {
    __m512i entry[F32::kTerms];
    split_pairs<F32::kTerms>(
        load_first(even + tile * kTile, even == nullptr ? 0 : columns),
        load_first(odd + tile * kTile, odd == nullptr ? 0 : columns), entry);
    for (int t = 0; t < F32::kTerms; ++t) _mm512_store_si512(to + (t * 2 + tile) * kTileWords, entry[t]);
  }
}

// Asks for a chunk of rows, along the rows.
template <typename Number>
inline void fetch(const Number* data, int64_t row_stride, int64_t rows, int64_t columns) {
  for (int64_t m = 0; m < rows; ++m) {
    const char* row = reinterpret_cast<const char*>(data + m * row_stride);
    for (int64_t at = 0; at < columns * static_cast<int64_t>(sizeof(Number)); at += 64) {
      _mm_prefetch(row + at, _MM_HINT_T1);
    }
  }
}

// Asks for a block of sums that will be changed.
inline void fetch_sums(const float* sums) {
  for (int64_t i = 0; i < kBlockSums; i += 16) __builtin_prefetch(sums + i, 1);
}

// Up to 32 columns: [steps][terms][2 column tiles][16 pairs of rows][16]
template <typename T>
void lay_out(const typename T::Number* data, int64_t row_stride, int64_t rows, int64_t columns, uint16_t* tiles) {
  for (int64_t m = 0; m < round_up(rows, kDepth); m += 2) {
    uint16_t* to = tiles + m / kDepth * T::kTerms * 2 * kTileWords + m % kDepth / 2 * kDepth;
    lay_out_pair(
        m < rows ? data + m * row_stride : nullptr, m + 1 < rows ? data + (m + 1) * row_stride : nullptr, columns, to);
  }
}

// Loads stand right before their first use: a tile load takes most of the time of a multiplication.
inline void multiply_both(const uint16_t* left, const uint16_t* right) {
  tile_load<6>(right, 64);
  tile_load<4>(left, 64);
  tile_multiply<0, 4, 6>();
  tile_load<7>(right + kTileWords, 64);
  tile_multiply<1, 4, 7>();
  tile_load<5>(left + kTileWords, 64);
  tile_multiply<2, 5, 6>();
  tile_multiply<3, 5, 7>();
}

// New left tiles meet the right tiles that are there, and the other way around.
inline void multiply_left(const uint16_t* left) {
  tile_load<4>(left, 64);
  tile_multiply<0, 4, 6>();
  tile_multiply<1, 4, 7>();
  tile_load<5>(left + kTileWords, 64);
  tile_multiply<2, 5, 6>();
  tile_multiply<3, 5, 7>();
}

inline void multiply_right(const uint16_t* right) {
  tile_load<6>(right, 64);
  tile_multiply<0, 4, 6>();
  tile_multiply<2, 5, 6>();
  tile_load<7>(right + kTileWords, 64);
  tile_multiply<1, 4, 7>();
  tile_multiply<3, 5, 7>();
}

inline void multiply_step(const uint16_t* left, const uint16_t* right, Bf16) { multiply_both(left, right); }

// The pairs of terms whose numbers add up to two at most, the large product last.
inline void multiply_step(const uint16_t* left, const uint16_t* right, F32) {
  constexpr int64_t kTerm = 2 * kTileWords;
  multiply_both(left, right + 2 * kTerm);
  multiply_right(right + kTerm);
  multiply_left(left + kTerm);
  multiply_right(right);
  multiply_left(left + 2 * kTerm);
  multiply_left(left);
}

// A chunk is summed by itself, so that rounding errors grow with its length and not with M.
inline void add_chunk(const float* chunk, float* sums) {
  for (int64_t i = 0; i < kBlockSums; i += 16) {
    _mm512_store_ps(sums + i, _mm512_add_ps(_mm512_load_ps(sums + i), _mm512_load_ps(chunk + i)));
  }
}

template <typename T>
void multiply(
    const SliceColumns& few, const Matrix& many, int64_t first, int64_t begin, int64_t end, bool add, void* workspace,
    float* sums) {
  const TileScope scope;
  constexpr int64_t step_words = T::kTerms * 2 * kTileWords;
  const int64_t rows = smaller(T::kChunkRows, many.rows - first), steps = divide_up(rows, kDepth);
  const typename T::Number* data = static_cast<const typename T::Number*>(many.data) + first * many.row_stride;
  uint16_t* tiles = static_cast<uint16_t*>(workspace);
  alignas(64) float chunk[kBlockSums];
  fetch(data + begin, many.row_stride, rows, end - begin);
  for (int64_t c = begin; c < end; c += kSliceColumns) {
    lay_out<T>(data + c, many.row_stride, rows, end - c, tiles);
    for (int64_t j = 0; j < few.few; j += kSliceColumns, sums += kBlockSums) {
      fetch_sums(sums + kBlockSums);
      zero_sums();
      const uint16_t *left = few.tiles + (j / kSliceColumns * few.steps + first / kDepth) * step_words, *right = tiles;
      for (int64_t step = 0; step < steps; ++step, left += step_words, right += step_words) {
        multiply_step(left, right, T());
      }
      store_sums(add ? chunk : sums, kTile * kTile, kTile);
      if (add) add_chunk(chunk, sums);
    }
  }
}

inline void store_floats(const float* sums, int64_t count, bool add, float* to) {
  const __mmask16 exist = first_floats(count);
  const __m512 before = _mm512_maskz_loadu_ps(add ? exist : 0, to);
  _mm512_mask_storeu_ps(to, exist, _mm512_add_ps(before, _mm512_load_ps(sums)));
}

void store(const float* sums, int64_t few, int64_t rows, int64_t columns, bool add, float* to, int64_t stride) {
  const int64_t blocks = few / kSliceColumns;
  for (int64_t c = 0; c < columns; c += kSliceColumns, sums += blocks * kBlockSums) {
    for (int64_t j = 0; j < rows; ++j) {
      const float* row = sums + j / kTile * 2 * kTile * kTile + j % kTile * kTile;
      store_floats(row, columns - c, add, to + j * stride + c);
      store_floats(row + kTile * kTile, columns - c - kTile, add, to + j * stride + c + kTile);
    }
  }
}

template <typename T>
constexpr SliceTiles slice_tiles() {
  return {T::kTerms, sizeof(typename T::Number), T::kChunkRows, pack<T>, multiply<T>, store};
}

}  // namespace

const SliceTiles slice_tiles_bf16 = slice_tiles<Bf16>();
const SliceTiles slice_tiles_f32 = slice_tiles<F32>();

}  // namespace peft_kernels
