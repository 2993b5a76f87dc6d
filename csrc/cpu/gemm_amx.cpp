// The product of gemm_amx.h on processors with matrix tiles.
//
// bfloat16 operands go to the tiles as they are. float32 operands are split into three bfloat16 terms each, exactly,
// and the six products of terms that matter at 24 bits are summed: what is left out is below 2^-24 of |x| |matrix|,
// no more than one rounding, and 6 tile instructions are still 2.7 times faster than 16 of AVX-512.
//
// Two by two tiles of sums take all of a depth chunk before they leave the registers. The right operand of such a chunk
// (a panel of 32 columns) is laid out once and read from the nearest caches; the left one is read from L2, as whole
// tiles one after the other. The product of rank r is a few steps of depth more, on terms of hidden and factor.
//
// An infinite operand makes its results infinite or NaN. Tile instructions count subnormal numbers as zero, so float32
// operands and results below about 2^-110 lose low bits; operands from 3.39e38 on count as infinite.
#include "gemm_amx.h"
#include "amx_tiles.h"

namespace peft_kernels {
namespace {

constexpr int64_t kBlockSums = 4 * kTile * kTile;  // floats of two by two tiles: [row tile][column tile][16][16]
constexpr int64_t kDepthChunk = 320;               // a panel of it: 20 KiB in bfloat16, 60 KiB in three terms
constexpr int64_t kAhead = 256;                    // bytes that rows are fetched ahead, by hand

struct Bf16 {
  using Number = uint16_t;
  static constexpr int kTerms = 1;
  // Panels that share a chunk of the left operand before the next one is read.
  static constexpr int64_t kPanelGroup = 1;
  // Left and right terms of the steps that sum hidden factor, 16 ranks twice per step.
  static constexpr int kSideSteps = 2;
};

struct F32 {
  using Number = float;
  static constexpr int kTerms = 3;
  static constexpr int64_t kPanelGroup = 8;
  static constexpr int kSideSteps = 3;
};

// A step multiplies [l0 | l1] with [r0 ; r1]: together all four pairs of two terms, and all of three that matter.
struct SideStep {
  int left[2], right[2];
};
constexpr SideStep kSide[3] = {{{0, 0}, {0, 1}}, {{1, 1}, {0, 1}}, {{0, 2}, {2, 0}}};

inline int64_t depth_blocks(const GemmArguments& a) { return divide_up(a.x.columns, kDepth); }
inline int64_t rank_blocks(const GemmArguments& a) { return divide_up(a.factor.rank, kTile); }

// Left tiles of a row block: [depth blocks][terms][2 row tiles], then the side path's [rank blocks][steps][2 row
// tiles].
template <typename T>
int64_t row_block_words(const GemmArguments& a) {
  return (depth_blocks(a) * T::kTerms + rank_blocks(a) * T::kSideSteps) * 2 * kTileWords;
}

template <typename T>
int64_t left_bytes(const GemmArguments& a, int64_t rows) {
  return divide_up(rows, kGemmRows) * row_block_words<T>(a) * 2;
}

// --- laying out the left operand ---

// One row of 32 numbers, as its terms.
inline void lay_out_row(const uint16_t* from, int64_t count, uint16_t* to) {
  _mm512_store_si512(to, _mm512_maskz_loadu_epi16(first_columns(count), from));
}

inline void lay_out_row(const float* from, int64_t count, uint16_t* to) {
  __m512i row[F32::kTerms];
  split_row<F32::kTerms>(load_first(from, count), load_first(from + 16, count - 16), row);
  for (int t = 0; t < F32::kTerms; ++t) _mm512_store_si512(to + t * 2 * kTileWords, row[t]);
}

template <typename T>
void lay_out_hidden(const GemmArguments& a, int64_t m, int64_t rows, uint16_t* to) {
  const int64_t rank = a.hidden.rank;
  for (int64_t block = 0; block < rank_blocks(a); ++block) {
    uint16_t* steps = to + block * T::kSideSteps * 2 * kTileWords;
    for (int64_t i = 0; i < kGemmRows; ++i) {
      const float* from = static_cast<const float*>(a.hidden.data) + (m + i) * rank + block * kTile;
      __m512 term[T::kSideSteps];
      split<T::kSideSteps>(load_first(from, i < rows ? rank - block * kTile : 0), term);
      for (int step = 0; step < T::kSideSteps; ++step) {
        const int* left = kSide[step].left;
        _mm512_store_si512(steps + step * 2 * kTileWords + i * kDepth, joined(term[left[0]], term[left[1]]));
      }
    }
  }
}

template <typename T>
void lay_out(const GemmArguments& a, int64_t first, int64_t begin, int64_t end, void* tiles) {
  using Number = typename T::Number;
  const int64_t blocks = depth_blocks(a);
  for (int64_t m = begin; m < end; m += kGemmRows) {
    const int64_t rows = smaller(kGemmRows, end - m);
    uint16_t* to = static_cast<uint16_t*>(tiles) + (m - first) / kGemmRows * row_block_words<T>(a);
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t i = 0; i < kGemmRows; ++i) {
        const Number* from = static_cast<const Number*>(a.x.data) + (m + i) * a.x.row_stride + block * kDepth;
        _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
        const int64_t count = i < rows ? a.x.columns - block * kDepth : 0;
        lay_out_row(from, count, to + block * T::kTerms * 2 * kTileWords + i * kDepth);
      }
    }
    lay_out_hidden<T>(a, m, rows, to + blocks * T::kTerms * 2 * kTileWords);
  }
}

// --- laying out a panel of the right operand: [depth blocks][terms][2 column tiles] ---

// A block of 32 k by 32 columns. Numbers beyond the matrix are copied to a zeroed block first.
template <typename Number>
struct RightBlock {
  const Number* data;
  int64_t depth_stride, column_stride;
};

template <typename Number>
RightBlock<Number> right_block(const GemmArguments& a, int64_t k, int64_t c, Number* staged) {
  const Number* from = static_cast<const Number*>(a.matrix) + k * a.depth_stride + c * a.column_stride;
  const int64_t depth = smaller(kDepth, a.x.columns - k), columns = smaller(kGemmColumns, a.out.columns - c);
  if (depth == kDepth && columns == kGemmColumns) return {from, a.depth_stride, a.column_stride};
  std::memset(staged, 0, sizeof(Number) * kDepth * kGemmColumns);
  if (a.column_stride == 1) {
    for (int64_t i = 0; i < depth; ++i) {
      std::memcpy(staged + i * kGemmColumns, from + i * a.depth_stride, sizeof(Number) * columns);
    }
    return {staged, kGemmColumns, 1};
  }
  for (int64_t i = 0; i < columns; ++i) {
    std::memcpy(staged + i * kDepth, from + i * a.column_stride, sizeof(Number) * depth);
  }
  return {staged, 1, kDepth};
}

// The contiguous runs of the next block: a matrix walked down in steps of 64 bytes is nothing that the hardware
// prefetchers follow. Addresses beyond the matrix are harmless, a prefetch never faults.
template <typename Number>
inline void fetch_ahead(const RightBlock<Number>& block, bool along_depth) {
  const int64_t bytes = kDepth * sizeof(Number);
  for (int64_t i = 0; i < kDepth; ++i) {
    const char* run =
        reinterpret_cast<const char*>(block.data + i * (along_depth ? block.column_stride : block.depth_stride));
    const char* ahead = along_depth ? run + kAhead : run + (kDepth * block.depth_stride) * sizeof(Number);
    for (int64_t line = 0; line < bytes; line += 64) _mm_prefetch(ahead + line, _MM_HINT_T0);
  }
}

// A panel of 32 columns from c on, at depths [k_begin, k_end).
struct RightPanel {
  int64_t k_begin, k_end, c;
};

// Brings one of `parts` parts of a panel into L2, while another one is being multiplied.
template <typename T>
inline void fetch_panel(const GemmArguments& a, const RightPanel& panel, int64_t part, int64_t parts) {
  using Number = typename T::Number;
  const bool along_depth = a.column_stride != 1;
  const int64_t depth = smaller(panel.k_end, a.x.columns) - panel.k_begin;
  const int64_t columns = smaller(kGemmColumns, a.out.columns - panel.c);
  const int64_t runs = along_depth ? columns : depth, length = along_depth ? depth : columns;
  const int64_t stride = along_depth ? a.column_stride : a.depth_stride;
  const Number* data =
      static_cast<const Number*>(a.matrix) + panel.k_begin * a.depth_stride + panel.c * a.column_stride;
  for (int64_t run = runs * part / parts; run < runs * (part + 1) / parts; ++run) {
    const char* from = reinterpret_cast<const char*>(data + run * stride);
    for (int64_t at = 0; at < length * static_cast<int64_t>(sizeof(Number)); at += 64) {
      _mm_prefetch(from + at, _MM_HINT_T1);
    }
  }
}

inline void lay_out_block(const RightBlock<uint16_t>& from, uint16_t* to) {
  if (from.column_stride != 1) {  // columns lie along k: pairs are 32-bit entries, to be transposed
    transpose_entries(from.data, from.column_stride * 2, to);
    transpose_entries(from.data + kTile * from.column_stride, from.column_stride * 2, to + kTileWords);
    return;
  }
  for (int64_t p = 0; p < kTile; ++p) {
    const uint16_t* even = from.data + 2 * p * from.depth_stride;
    __m512i low, high;
    pair_words(_mm512_loadu_si512(even), _mm512_loadu_si512(even + from.depth_stride), &low, &high);
    _mm512_store_si512(to + p * kDepth, low);
    _mm512_store_si512(to + kTileWords + p * kDepth, high);
  }
}

inline void lay_out_block(const RightBlock<float>& from, uint16_t* to) {
  alignas(64) float rows[kDepth][kTile];  // [k][column]
  for (int64_t tile = 0; tile < 2; ++tile) {
    const float* data = from.data + tile * kTile * from.column_stride;
    const bool transposed = from.column_stride != 1;
    if (transposed) {
      transpose_entries(data, from.column_stride * 4, rows);
      transpose_entries(data + kTile, from.column_stride * 4, rows + kTile);
    }
    for (int64_t p = 0; p < kTile; ++p) {
      const float* even_row = transposed ? rows[2 * p] : data + 2 * p * from.depth_stride;
      const float* odd_row = transposed ? rows[2 * p + 1] : even_row + from.depth_stride;
      __m512i entry[F32::kTerms];
      split_pairs<F32::kTerms>(_mm512_loadu_ps(even_row), _mm512_loadu_ps(odd_row), entry);
      for (int t = 0; t < F32::kTerms; ++t) {
        _mm512_store_si512(to + (t * 2 + tile) * kTileWords + p * kDepth, entry[t]);
      }
    }
  }
}

template <typename T>
void lay_out_panel(const GemmArguments& a, const RightPanel& panel, uint16_t* to) {
  using Number = typename T::Number;
  alignas(64) Number staged[kDepth * kGemmColumns];
  for (int64_t k = panel.k_begin; k < panel.k_end; k += kDepth, to += T::kTerms * 2 * kTileWords) {
    const RightBlock<Number> block = right_block(a, k, panel.c, staged);
    fetch_ahead(block, a.column_stride != 1);
    lay_out_block(block, to);
  }
}

// The factor's panel: [rank blocks][steps][2 column tiles].
template <typename T>
void lay_out_factor(const GemmArguments& a, int64_t c, uint16_t* to) {
  const Factor& factor = a.factor;
  const __m512 scale = _mm512_set1_ps(static_cast<float>(factor.scale));
  alignas(64) float corner[kTile][16];  // [rank][column]
  for (int64_t block = 0; block < rank_blocks(a); ++block) {
    for (int64_t tile = 0; tile < 2; ++tile) {
      const int64_t j = block * kTile, column = c + tile * kTile;
      load_block<kTile>(
          static_cast<const float*>(factor.data) + j * factor.rank_stride + column * factor.column_stride,
          factor.rank_stride, factor.column_stride, factor.rank - j, factor.columns - column, corner);
      for (int64_t p = 0; p < kTile / 2; ++p) {
        __m512i entry[T::kSideSteps];
        split_pairs<T::kSideSteps>(
            _mm512_mul_ps(_mm512_load_ps(corner[2 * p]), scale),
            _mm512_mul_ps(_mm512_load_ps(corner[2 * p + 1]), scale), entry);
        for (int step = 0; step < T::kSideSteps; ++step) {
          uint16_t* at = to + ((block * T::kSideSteps + step) * 2 + tile) * kTileWords + p * kDepth;
          for (int half = 0; half < 2; ++half) {
            _mm512_store_si512(at + half * kTileWords / 2, entry[kSide[step].right[half]]);
          }
        }
      }
    }
  }
}

// --- the main loop: tiles 0 to 3 are sums [row tile][column tile], 4 and 5 left, 6 and 7 right ---

// Loads stand right before their first use: a tile load takes half the time of a multiplication.
template <int row>
inline void multiply_left(const uint16_t* left) {
  tile_load<4 + row>(left + row * kTileWords, 64);
  tile_multiply<2 * row, 4 + row, 6>();
  tile_multiply<2 * row + 1, 4 + row, 7>();
}

// New left tiles meet the right tiles that are there.
inline void multiply_left(const uint16_t* left) {
  multiply_left<0>(left);
  multiply_left<1>(left);
}

// New right tiles meet the left tiles that are there.
inline void multiply_right(const uint16_t* right) {
  tile_load<6>(right, 64);
  tile_multiply<0, 4, 6>();
  tile_multiply<2, 5, 6>();
  tile_load<7>(right + kTileWords, 64);
  tile_multiply<1, 4, 7>();
  tile_multiply<3, 5, 7>();
}

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

inline void multiply_steps(const uint16_t* left, const uint16_t* right, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step, left += 2 * kTileWords, right += 2 * kTileWords) {
    multiply_both(left, right);
  }
}

inline void multiply_depth(const uint16_t* left, const uint16_t* right, int64_t blocks, Bf16) {
  multiply_steps(left, right, blocks);
}

// The pairs of terms (left, right) whose numbers add up to two at most, the large product last.
inline void multiply_depth(const uint16_t* left, const uint16_t* right, int64_t blocks, F32) {
  constexpr int64_t kTerm = 2 * kTileWords;
  for (int64_t block = 0; block < blocks; ++block, left += 3 * kTerm, right += 3 * kTerm) {
    multiply_both(left, right + 2 * kTerm);
    multiply_right(right + kTerm);
    multiply_left(left + kTerm);
    multiply_right(right);
    multiply_left(left + 2 * kTerm);
    multiply_left(left);
  }
}

// Zeroes dropped elements of a block of sums in memory: columns from c on, a multiple of 32.
inline void drop(const GemmArguments& a, int64_t m, int64_t rows, int64_t c, float* sums) {
  for (int64_t i = 0; i < rows; ++i) {
    const uint64_t keep = a.keep[(m + i) * a.keep_stride + c / kPanel] >> (c % kPanel);
    float* low = sums + i / kTile * 2 * kTile * kTile + i % kTile * kTile;
    float* high = low + kTile * kTile;
    _mm512_store_ps(low, _mm512_maskz_load_ps(static_cast<__mmask16>(keep), low));
    _mm512_store_ps(high, _mm512_maskz_load_ps(static_cast<__mmask16>(keep >> 16), high));
  }
}

// --- storing a finished block ---

// Rows of 32 numbers of one type, the first `columns` of which exist.
template <typename Number>
class RowStore;

template <>
class RowStore<uint16_t> {
 public:
  RowStore(const uint16_t* bias, int64_t columns) : valid_(first_columns(columns)) {
    if (bias == nullptr) return;
    const __m512i added = _mm512_maskz_loadu_epi16(valid_, bias);
    low_bias_ = bf16_low(added);
    high_bias_ = bf16_high(added);
  }
  void store(uint16_t* out, __m512 low, __m512 high) const {
    const __m512bh row = _mm512_cvtne2ps_pbh(_mm512_add_ps(high, high_bias_), _mm512_add_ps(low, low_bias_));
    _mm512_mask_storeu_epi16(out, valid_, (__m512i)row);
  }

 private:
  __mmask32 valid_;
  __m512 low_bias_ = _mm512_setzero_ps(), high_bias_ = _mm512_setzero_ps();
};

template <>
class RowStore<float> {
 public:
  RowStore(const float* bias, int64_t columns) : low_(first_floats(columns)), high_(first_floats(columns - 16)) {
    if (bias == nullptr) return;
    low_bias_ = _mm512_maskz_loadu_ps(low_, bias);
    high_bias_ = _mm512_maskz_loadu_ps(high_, bias + 16);
  }
  void store(float* out, __m512 low, __m512 high) const {
    _mm512_mask_storeu_ps(out, low_, _mm512_add_ps(low, low_bias_));
    _mm512_mask_storeu_ps(out + 16, high_, _mm512_add_ps(high, high_bias_));
  }

 private:
  __mmask16 low_, high_;
  __m512 low_bias_ = _mm512_setzero_ps(), high_bias_ = _mm512_setzero_ps();
};

template <typename T>
void store_block(const GemmArguments& a, int64_t m, int64_t rows, int64_t c, const float* sums) {
  using Number = typename T::Number;
  const Number* bias = a.bias == nullptr ? nullptr : static_cast<const Number*>(a.bias) + c;
  const RowStore<Number> row(bias, a.out.columns - c);
  Number* out = static_cast<Number*>(a.out.data) + m * a.out.row_stride + c;
  for (int64_t tile = 0; tile < rows; tile += kTile, sums += 2 * kTile * kTile) {
    for (int64_t i = 0; i < smaller(kTile, rows - tile); ++i, out += a.out.row_stride) {
      row.store(out, _mm512_load_ps(sums + i * kTile), _mm512_load_ps(sums + (kTile + i) * kTile));
    }
  }
}

// --- the product ---

// A thread's workspace: one panel of the right operand, the factor's panel, and unfinished sums of a group of panels.
template <typename T>
struct Workspace {
  int64_t depth_chunk;  // the depth cut evenly
  uint16_t* panel;
  uint16_t* factor;
  float* sums;
  int64_t bytes;

  Workspace(const GemmArguments& a, int64_t rows, void* memory) {
    const int64_t blocks = larger(1, depth_blocks(a)), chunks = divide_up(blocks * kDepth, kDepthChunk);
    depth_chunk = divide_up(blocks, chunks) * kDepth;
    const int64_t panel_words = depth_chunk / kDepth * T::kTerms * 2 * kTileWords;
    const int64_t factor_words = rank_blocks(a) * T::kSideSteps * 2 * kTileWords;
    const int64_t sums_count = chunks > 1 ? T::kPanelGroup * divide_up(rows, kGemmRows) * kBlockSums : 0;
    panel = static_cast<uint16_t*>(memory);
    factor = panel + panel_words;
    sums = reinterpret_cast<float*>(factor + factor_words);
    bytes = (panel_words + factor_words) * 2 + sums_count * 4;
  }
};

template <typename T>
int64_t workspace_bytes(const GemmArguments& a, int64_t rows) {
  return Workspace<T>(a, rows, nullptr).bytes;
}

template <typename T>
void multiply(
    const GemmArguments& a, int64_t first, int64_t last, int64_t begin, int64_t end, const void* tiles, void* memory) {
  const TileScope scope;
  const Workspace<T> workspace(a, last - first, memory);
  const int64_t depth = depth_blocks(a) * kDepth, row_words = row_block_words<T>(a);
  const int64_t side_offset = depth_blocks(a) * T::kTerms * 2 * kTileWords;
  const int64_t row_blocks = divide_up(last - first, kGemmRows), panel_sums = row_blocks * kBlockSums;
  const uint16_t* left = static_cast<const uint16_t*>(tiles);
  alignas(64) float sums[kBlockSums];
  for (int64_t group = begin; group < end; group += T::kPanelGroup * kGemmColumns) {
    const int64_t group_end = smaller(end, group + T::kPanelGroup * kGemmColumns);
    // Without depth there is one round all the same: the product of rank r and the bias are left.
    for (int64_t k = 0; k == 0 || k < depth; k += workspace.depth_chunk) {
      const int64_t k_end = smaller(depth, k + workspace.depth_chunk);
      for (int64_t c = group; c < group_end; c += kGemmColumns) {
        lay_out_panel<T>(a, {k, k_end, c}, workspace.panel);
        const RightPanel next = c + kGemmColumns < group_end ? RightPanel{k, k_end, c + kGemmColumns}
                                : k_end < depth
                                    ? RightPanel{k_end, smaller(depth, k_end + workspace.depth_chunk), group}
                                    : RightPanel{0, smaller(depth, workspace.depth_chunk), group_end};
        if (k == 0) lay_out_factor<T>(a, c, workspace.factor);
        float* unfinished = workspace.sums + (c - group) / kGemmColumns * panel_sums;
        for (int64_t m = first; m < last; m += kGemmRows, unfinished += kBlockSums) {
          const uint16_t* row_tiles = left + (m - first) / kGemmRows * row_words;
          const int64_t rows = smaller(kGemmRows, last - m);
          if (next.c < a.out.columns) fetch_panel<T>(a, next, (m - first) / kGemmRows, row_blocks);
          if (k == 0) {
            zero_sums();
            multiply_steps(row_tiles + side_offset, workspace.factor, rank_blocks(a) * T::kSideSteps);
            if (a.keep != nullptr) {
              store_sums(sums, kTile * kTile, kTile);
              drop(a, m, rows, c, sums);
              load_sums(sums, kTile * kTile, kTile);
            }
          } else {
            load_sums(unfinished, kTile * kTile, kTile);
          }
          multiply_depth(
              row_tiles + k / kDepth * T::kTerms * 2 * kTileWords, workspace.panel, (k_end - k) / kDepth, T());
          if (k_end < depth) {
            store_sums(unfinished, kTile * kTile, kTile);
            continue;
          }
          store_sums(sums, kTile * kTile, kTile);
          store_block<T>(a, m, rows, c, sums);
        }
      }
    }
  }
}

template <typename T>
constexpr GemmKernel kernel() {
  return {left_bytes<T>, workspace_bytes<T>, lay_out<T>, multiply<T>};
}

}  // namespace

const GemmKernel gemm_amx_bf16 = kernel<Bf16>();
const GemmKernel gemm_amx_f32 = kernel<F32>();

}  // namespace peft_kernels
