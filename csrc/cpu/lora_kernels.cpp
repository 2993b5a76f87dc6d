// LoRA kernels for one instruction set. Compiled once per capability with -DPK_CAPABILITY=<name>; see simd.h.
//
// All three products are skinny: one dimension is the rank. Per activation element they do r multiply-adds, so what
// counts is to keep r accumulators in registers, to convert (and drop) each element once, and to touch it once.
#include "lora_kernels.h"
#include "simd.h"

#if !defined(PK_CAPABILITY)
#error "compile with -DPK_CAPABILITY=baseline|avx2|avx512"
#endif

namespace peft_kernels {
namespace {

// Accumulator rows of the micro-kernels, chosen so that accumulators, operands and a broadcast fit the registers.
#if defined(__AVX512F__)
constexpr int kUpdateRows = 12;
constexpr int kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kUpdateRows = 6;
constexpr int kTileVectors = 2;
#else
constexpr int kUpdateRows = 2;
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 6;
constexpr int kRankBlock = 16;       // ranks are padded to it with zeros
constexpr int64_t kRowUnit = 24;     // a multiple of both row counts
constexpr int64_t kChunk = 128;      // columns converted at a time in shrink: kUpdateRows rows of them stay in L1
constexpr int64_t kRankChunk = 256;  // ranks summed at a time in shrink
constexpr int64_t kRowChunk = 64;    // rows converted at a time in grad
constexpr int64_t kGradRanks = 64;   // ranks summed at a time in grad

// count elements of one row, converted to acc and zeroed where dropped; `column` is a multiple of kDrawBatch.
template <typename T, typename acc>
void convert_row(const T* from, acc* to, int64_t row, int64_t column, int64_t count, const Dropout& dropout) {
  constexpr int lanes = kLanes<acc>;
  if (!dropout.active) {
    int64_t c = 0;
    for (; c + lanes <= count; c += lanes) store_vector(to + c, load_vector(from + c));
    if (c < count)
      store_partial(to + c, load_partial(from + c, static_cast<int>(count - c)), static_cast<int>(count - c));
    return;
  }
  for (int64_t batch = 0; batch < count; batch += kDrawBatch) {
    const uint64_t word = keep_word(dropout, row, column + batch);
    for (int c = 0; c < kDrawBatch && batch + c < count; c += lanes) {
      const int64_t at = batch + c;
      const int valid = static_cast<int>(smaller(lanes, count - at));
      const Vector<acc> value = valid == lanes ? load_vector(from + at) : load_partial(from + at, valid);
      const Vector<acc> kept = keep_lanes<acc>(value, word >> c);
      if (valid == lanes) {
        store_vector(to + at, kept);
      } else {
        store_partial(to + at, kept, valid);
      }
    }
  }
}

// sums[i, :] += sum_t left[i * stride_i + t * stride_t] * right[t * stride_right, :], rows i < I, kRankBlock columns.
// The sum over t starts from zero and is added at the end, so that rounding errors grow with the chunk, not the length.
template <int I, typename acc>
inline void rank_one_updates(
    const acc* left, int64_t stride_i, int64_t stride_t, int64_t count, const acc* right, int64_t stride_right,
    acc* sums, int64_t stride_sums) {
  constexpr int lanes = kLanes<acc>;
  constexpr int vectors = kRankBlock / lanes;
  Vector<acc> sum[I][vectors] = {};
  for (int64_t t = 0; t < count; ++t) {
    Vector<acc> row[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) row[v] = load_vector(right + t * stride_right + v * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
      const Vector<acc> scalar = splat(left[i * stride_i + t * stride_t]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[i][v] += scalar * row[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      acc* at = sums + i * stride_sums + v * lanes;
      store_vector(at, load_vector(at) + sum[i][v]);
    }
  }
}

// The same for any number of rows: full blocks, then one by one.
template <typename acc>
inline void rank_one_updates_rows(
    int64_t rows, const acc* left, int64_t stride_i, int64_t stride_t, int64_t count, const acc* right,
    int64_t stride_right, acc* sums, int64_t stride_sums) {
  int64_t i = 0;
  for (; i + kUpdateRows <= rows; i += kUpdateRows) {
    rank_one_updates<kUpdateRows>(
        left + i * stride_i, stride_i, stride_t, count, right, stride_right, sums + i * stride_sums, stride_sums);
  }
  for (; i + 4 <= rows; i += 4) {
    rank_one_updates<4>(
        left + i * stride_i, stride_i, stride_t, count, right, stride_right, sums + i * stride_sums, stride_sums);
  }
  for (; i < rows; ++i) {
    rank_one_updates<1>(
        left + i * stride_i, stride_i, stride_t, count, right, stride_right, sums + i * stride_sums, stride_sums);
  }
}

// --- shrink: factor packed as [rank blocks][columns][kRankBlock] ---

template <typename acc>
int64_t shrink_packed_bytes(const Factor& factor) {
  return static_cast<int64_t>(sizeof(acc)) * round_up(factor.rank, kRankBlock) * factor.columns;
}

// Scalars in the order of the source's rows: reading vectors that were just written as scalars would stall.
template <typename acc>
void shrink_pack(const Factor& factor, int64_t begin, int64_t end, void* packed) {
  const acc scale = static_cast<acc>(factor.scale);
  const int64_t padded_rank = round_up(factor.rank, kRankBlock);
  for (int64_t j = 0; j < padded_rank; ++j) {
    const acc* from = static_cast<const acc*>(factor.data) + j * factor.rank_stride;
    acc* to = static_cast<acc*>(packed) + j / kRankBlock * kRankBlock * factor.columns + j % kRankBlock;
    for (int64_t c = begin; c < end; ++c) {
      to[c * kRankBlock] = j < factor.rank ? from[c * factor.column_stride] * scale : acc(0);
    }
  }
}

template <typename T>
void shrink(
    const Matrix& x, int64_t begin, int64_t end, const Factor& factor, const void* packed, const Hidden& hidden,
    const Dropout& dropout) {
  using acc = typename Accumulate<T>::type;
  const T* data = static_cast<const T*>(x.data);
  const acc* right = static_cast<const acc*>(packed);
  acc* result = static_cast<acc*>(hidden.data);
  const bool direct = sizeof(T) == sizeof(acc) && !dropout.active;  // float and double need no conversion
  alignas(64) acc converted[kUpdateRows * kChunk];
  alignas(64) acc sums[kUpdateRows * kRankChunk];
  for (int64_t m = begin; m < end; m += kUpdateRows) {
    const int64_t rows = smaller(kUpdateRows, end - m);
    for (int64_t first = 0; first < factor.rank; first += kRankChunk) {
      const int64_t ranks = smaller(kRankChunk, factor.rank - first);
      std::memset(sums, 0, sizeof(sums));
      for (int64_t c = 0; c < x.columns; c += kChunk) {
        const int64_t count = smaller(kChunk, x.columns - c);
        const T* block = data + m * x.row_stride + c;
        for (int64_t i = 0; i < rows && !direct; ++i) {
          convert_row(block + i * x.row_stride, converted + i * kChunk, m + i, c, count, dropout);
        }
        const acc* left = direct ? reinterpret_cast<const acc*>(block) : converted;
        for (int64_t j = 0; j < ranks; j += kRankBlock) {
          rank_one_updates_rows(
              rows, left, direct ? x.row_stride : kChunk, int64_t{1}, count,
              right + (first + j) * x.columns + c * kRankBlock, int64_t{kRankBlock}, sums + j, kRankChunk);
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        std::memcpy(result + (m + i) * factor.rank + first, sums + i * kRankChunk, sizeof(acc) * ranks);
      }
    }
  }
}

// --- accumulate: factor packed as [column panels][rank][kPanel] ---

template <typename acc>
int64_t accumulate_packed_bytes(const Factor& factor) {
  return static_cast<int64_t>(sizeof(acc)) * factor.rank * round_up(factor.columns, kPanel);
}

template <typename acc>
void accumulate_pack(const Factor& factor, int64_t begin, int64_t end, void* packed) {
  const acc scale = static_cast<acc>(factor.scale);
  for (int64_t c = begin; c < round_up(end, kPanel); ++c) {
    const acc* from = static_cast<const acc*>(factor.data) + c * factor.column_stride;
    acc* to = static_cast<acc*>(packed) + c / kPanel * kPanel * factor.rank + c % kPanel;
    for (int64_t j = 0; j < factor.rank; ++j) {
      to[j * kPanel] = c < end ? from[j * factor.rank_stride] * scale : acc(0);
    }
  }
}

// One tile of out += D * hidden factor: I rows, kTileVectors vectors of columns, of which `valid` columns exist.
template <int I, typename T, typename acc>
inline void accumulate_tile(
    T* out, int64_t row_stride, const acc* hidden, int64_t rank, const acc* factor, int64_t valid, const uint64_t* keep,
    int64_t keep_shift) {
  constexpr int lanes = kLanes<acc>;
  Vector<acc> sum[I][kTileVectors] = {};
  for (int64_t j = 0; j < rank; ++j) {
    Vector<acc> row[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) row[v] = load_vector(factor + j * kPanel + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const Vector<acc> scalar = splat(hidden[i * rank + j]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[i][v] += scalar * row[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t left = valid - v * lanes;
      if (left <= 0) continue;
      T* at = out + i * row_stride + v * lanes;
      Vector<acc> update = sum[i][v];
      if (keep != nullptr) update = keep_lanes<acc>(update, keep[i] >> (keep_shift + v * lanes));
      if (left >= lanes) {
        store_vector(at, load_vector(at) + update);
      } else {
        store_partial(at, load_partial(at, static_cast<int>(left)) + update, static_cast<int>(left));
      }
    }
  }
}

template <int I, typename T, typename acc>
inline void accumulate_rows(
    const Matrix& out, int64_t row, const acc* hidden, int64_t rank, const acc* packed, const Dropout& dropout) {
  constexpr int width = kTileVectors * kLanes<acc>;
  T* to = static_cast<T*>(out.data) + row * out.row_stride;
  uint64_t keep[I];
  for (int64_t c = 0; c < out.columns; c += kPanel) {
    if (dropout.active) keep_rows(dropout, row, I, c, keep);
    const acc* panel = packed + c * rank;
    for (int64_t tile = 0; tile < kPanel && c + tile < out.columns; tile += width) {
      accumulate_tile<I>(
          to + c + tile, out.row_stride, hidden, rank, panel + tile, out.columns - c - tile,
          dropout.active ? keep : nullptr, tile);
    }
  }
}

template <typename T>
void accumulate(
    const Matrix& out, int64_t begin, int64_t end, const Hidden& hidden, const Factor& factor, const void* packed,
    const Dropout& dropout) {
  using acc = typename Accumulate<T>::type;
  const acc* left = static_cast<const acc*>(hidden.data);
  const acc* right = static_cast<const acc*>(packed);
  const int64_t rank = factor.rank;
  int64_t m = begin;
  for (; m + kTileRows <= end; m += kTileRows) {
    accumulate_rows<kTileRows, T>(out, m, left + m * rank, rank, right, dropout);
  }
  for (; m < end; ++m) accumulate_rows<1, T>(out, m, left + m * rank, rank, right, dropout);
}

// --- grad: hidden packed as [rows][rank padded to kRankBlock] ---

template <typename acc>
int64_t grad_packed_bytes(int64_t rows, int64_t rank) {
  return static_cast<int64_t>(sizeof(acc)) * rows * round_up(rank, kRankBlock);
}

template <typename acc>
void grad_pack(const Hidden& hidden, int64_t, int64_t begin, int64_t end, void* packed) {
  const int64_t padded_rank = round_up(hidden.rank, kRankBlock);
  const acc* from = static_cast<const acc*>(hidden.data);
  acc* to = static_cast<acc*>(packed);
  for (int64_t m = begin; m < end; ++m) {
    std::memcpy(to + m * padded_rank, from + m * hidden.rank, sizeof(acc) * hidden.rank);
    std::memset(to + m * padded_rank + hidden.rank, 0, sizeof(acc) * (padded_rank - hidden.rank));
  }
}

template <typename T>
void grad(
    const Matrix& x, int64_t begin, int64_t end, int64_t first_column, int64_t end_column, int64_t rank,
    const void* packed, void* partial, const Dropout& dropout) {
  using acc = typename Accumulate<T>::type;
  const T* data = static_cast<const T*>(x.data);
  const acc* right = static_cast<const acc*>(packed);
  const int64_t padded_rank = round_up(rank, kRankBlock);
  const bool direct = sizeof(T) == sizeof(acc) && !dropout.active;
  alignas(64) acc converted[kRowChunk * kPanel];
  alignas(64) acc sums[kGradColumns * kGradRanks];  // [panels][rank blocks][kPanel][kRankBlock]
  for (int64_t first = 0; first < rank; first += kGradRanks) {
    const int64_t ranks = smaller(kGradRanks, rank - first);
    for (int64_t c = first_column; c < end_column; c += kPanel) {
      std::memset(sums + (c - first_column) * kGradRanks, 0, sizeof(acc) * round_up(ranks, kRankBlock) * kPanel);
    }
    for (int64_t m = begin; m < end; m += kRowChunk) {
      const int64_t rows = smaller(kRowChunk, end - m);
      for (int64_t c = first_column; c < end_column; c += kPanel) {
        const int64_t columns = smaller(kPanel, end_column - c);
        const T* from = data + m * x.row_stride + c;
        for (int64_t i = 0; i < rows && !direct; ++i) {
          convert_row(from + i * x.row_stride, converted + i * kPanel, m + i, c, columns, dropout);
        }
        const acc* left = direct ? reinterpret_cast<const acc*>(from) : converted;
        acc* panel = sums + (c - first_column) * kGradRanks;
        for (int64_t j = 0; j < ranks; j += kRankBlock) {
          rank_one_updates_rows(
              columns, left, int64_t{1}, direct ? x.row_stride : kPanel, rows, right + m * padded_rank + first + j,
              padded_rank, panel + j * kPanel, int64_t{kRankBlock});
        }
      }
    }
    for (int64_t j = 0; j < ranks; ++j) {
      acc* to = static_cast<acc*>(partial) + (first + j) * x.columns;
      const acc* block = sums + j / kRankBlock * kRankBlock * kPanel + j % kRankBlock;
      for (int64_t c = first_column; c < end_column; ++c) {
        const int64_t at = c - first_column;
        to[c] = block[at / kPanel * kPanel * kGradRanks + at % kPanel * kRankBlock];
      }
    }
  }
}

void dropout_mask(bool* keep, int64_t columns, int64_t begin, int64_t end, const Dropout& dropout) {
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t c = 0; c < columns; c += kDrawBatch) {
      const uint64_t word = keep_word(dropout, m, c);
      const int64_t count = smaller(kDrawBatch, columns - c);
      for (int64_t i = 0; i < count; ++i) keep[m * columns + c + i] = (word >> i & 1) != 0;
    }
  }
}

void keep_words(uint64_t* keep, int64_t columns, int64_t begin, int64_t end, const Dropout& dropout) {
  const int64_t words = divide_up(columns, kDrawBatch);
  constexpr int64_t kRows = 8;
  for (int64_t m = begin; m < end; m += kRows) {
    const int64_t rows = smaller(kRows, end - m);
    for (int64_t word = 0; word < words; ++word) {
      uint64_t column[kRows];
      keep_rows(dropout, m, rows, word * kDrawBatch, column);
      for (int64_t i = 0; i < rows; ++i) keep[(m + i) * words + word] = column[i];
    }
  }
}

}  // namespace

#define PK_CONCATENATE(a, b) a##b
#define PK_TABLE_NAME(capability) PK_CONCATENATE(lora_kernels_, capability)
#define PK_STRING(a) #a
#define PK_CAPABILITY_NAME(capability) PK_STRING(capability)

template <typename T, typename acc = typename Accumulate<T>::type>
constexpr SkinnyKernels products() {
  return {
      kRowUnit,      shrink_packed_bytes<acc>,     shrink_pack<acc>,
      shrink<T>,     accumulate_packed_bytes<acc>, accumulate_pack<acc>,
      accumulate<T>, grad_packed_bytes<acc>,       grad_pack<acc>,
      grad<T>,
  };
}

const LoraKernels PK_TABLE_NAME(PK_CAPABILITY) = {
    PK_CAPABILITY_NAME(PK_CAPABILITY),
    {products<float>(), products<bf16>(), products<fp16>(), products<double>()},
    dropout_mask,
    keep_words,
    {},
};

}  // namespace peft_kernels
