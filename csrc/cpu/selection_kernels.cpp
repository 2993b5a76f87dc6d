// The kernels of the selection of entries for one instruction set. Compiled once per capability with
// -DPK_CAPABILITY=<name>; see simd.h.
//
// A tile of the product stays in registers over a chunk of M: per row of M a few vectors of x, a broadcast per column
// of grad_out, and a multiply-add for each pair of them, which bound it. The scan of a row is a comparison per vector,
// as next to nothing reaches the threshold.
#include "selection_kernels.h"
#include "simd.h"

#if !defined(PK_CAPABILITY)
#error "compile with -DPK_CAPABILITY=baseline|avx2|avx512"
#endif

namespace peft_kernels {
namespace {

#if defined(__AVX512F__)
constexpr int kLeft = 8;     // columns of grad_out in a tile
constexpr int kVectors = 3;  // vectors of columns of x
#else
constexpr int kLeft = 4;
constexpr int kVectors = kVectorBytes == 32 ? 3 : 2;
#endif
constexpr int64_t kChunkRows = 256;  // of M between additions to the product: short sums, and a panel in cache

// `width` numbers of a row, of which `columns` exist.
template <int64_t width, typename T, typename acc>
inline void pack_row(const T* from, int64_t columns, acc* row) {
  constexpr int64_t lanes = kLanes<acc>;
  if constexpr (width % lanes == 0) {
    for (int64_t c = 0; c < width; c += lanes) {
      const int64_t rest = columns - c;
      if (rest >= lanes) {
        store_vector(row + c, load_vector(from + c));
      } else {
        store_vector(row + c, rest > 0 ? load_partial(from + c, static_cast<int>(rest)) : Vector<acc>{});
      }
    }
  } else {  // narrower than a vector
    static_assert(width < lanes);
    acc wide[lanes];
    store_vector(wide, load_partial(from, static_cast<int>(columns >= width ? width : columns)));
    std::memcpy(row, wide, sizeof(acc) * width);
  }
}

template <typename T, int64_t width>
void pack(const Matrix& matrix, int64_t begin, int64_t end, void* panels) {
  using acc = typename Accumulate<T>::type;
  const T* data = static_cast<const T*>(matrix.data);
  acc* to = static_cast<acc*>(panels);
  // Along the rows, which is how memory likes to be read.
  for (int64_t m = 0; m < matrix.rows; ++m) {
    const T* row = data + m * matrix.row_stride;
    for (int64_t first = begin; first < end; first += width) {
      pack_row<width>(row + first, end - first, to + (first - begin) * matrix.rows + m * width);
    }
  }
}

template <typename acc, bool first>
inline void multiply_tile(const acc* left, const acc* right, int64_t depth, acc* product, int64_t stride) {
  constexpr int lanes = kLanes<acc>;
  Vector<acc> sum[kLeft][kVectors] = {};
  for (int64_t m = 0; m < depth; ++m, left += kLeft, right += kVectors * lanes) {
    Vector<acc> x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = load_vector(right + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kLeft; ++i) {
      const Vector<acc> dy = splat(left[i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] += dy * x[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLeft; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      acc* to = product + i * stride + v * lanes;
      store_vector(to, first ? sum[i][v] : load_vector(to) + sum[i][v]);
    }
  }
}

template <typename acc>
void multiply(
    const void* left_panels, int64_t rows, const void* right_panels, int64_t columns, int64_t depth, void* result,
    int64_t stride, bool add) {
  constexpr int64_t width = kVectors * kLanes<acc>;
  const acc* left = static_cast<const acc*>(left_panels);
  const acc* right = static_cast<const acc*>(right_panels);
  acc* product = static_cast<acc*>(result);
  for (int64_t m = 0; m == 0 || m < depth; m += kChunkRows) {
    const int64_t chunk = smaller(kChunkRows, depth - m);
    for (int64_t k = 0; k < columns; k += width) {
      const acc* x = right + k * depth + m * width;
      for (int64_t n = 0; n < rows; n += kLeft) {
        const acc* dy = left + n * depth + m * kLeft;
        acc* to = product + n * stride + k;
        if (m == 0 && !add) {
          multiply_tile<acc, true>(dy, x, chunk, to, stride);
        } else {
          multiply_tile<acc, false>(dy, x, chunk, to, stride);
        }
      }
    }
  }
}

// Bit i is set where lane i of a comparison is true.
template <typename Mask>
inline uint32_t bits_of(Mask mask) {
  constexpr int lanes = sizeof(mask) / sizeof(mask[0]);
#if defined(__AVX512F__)
  if constexpr (lanes == 16) return _mm512_movepi32_mask((__m512i)mask);
  if constexpr (lanes == 8) return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  if constexpr (lanes == 8) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
  if constexpr (lanes == 4) return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask));
#endif
  uint32_t bits = 0;
  for (int lane = 0; lane < lanes; ++lane) bits |= static_cast<uint32_t>(mask[lane] != 0) << lane;
  return bits;
}

template <typename acc>
int64_t above(const acc* values, int64_t count, acc threshold, uint32_t* places, acc* kept) {
  using Mask = typename VectorOf<acc>::mask;
  constexpr int64_t lanes = kLanes<acc>;
  const Vector<acc> limit = splat(threshold);
  int64_t found = 0;
  const auto take = [&](Vector<acc> value, int64_t at, uint32_t wanted) {
    // Written so that NaN is taken.
    const Mask below = (value < limit) & (-value < limit);
    for (uint32_t bits = ~bits_of(below) & wanted; bits != 0; bits &= bits - 1) {
      const int64_t place = at + __builtin_ctz(bits);
      places[found] = static_cast<uint32_t>(place);
      if (kept != nullptr) kept[found] = values[place];
      ++found;
    }
  };
  int64_t i = 0;
  constexpr uint32_t all = (1u << lanes) - 1u;
  for (; i + lanes <= count; i += lanes) take(load_vector(values + i), i, all);
  const int rest = static_cast<int>(count - i);
  if (rest > 0) take(load_partial(values + i, rest), i, (1u << rest) - 1u);
  return found;
}

template <typename acc>
void scale(const acc* values, int64_t count, acc factor, acc* products) {
  for (int64_t i = 0; i < count; ++i) products[i] = factor * values[i];
}

template <typename T>
constexpr SelectionProduct selection_product() {
  using acc = typename Accumulate<T>::type;
  constexpr int64_t width = kVectors * kLanes<acc>;
  return {kLeft, width, pack<T, kLeft>, pack<T, width>, multiply<acc>};
}

}  // namespace

#define PK_CONCATENATE(a, b) a##b
#define PK_TABLE_NAME(capability) PK_CONCATENATE(selection_kernels_, capability)

const SelectionKernels PK_TABLE_NAME(PK_CAPABILITY) = {
    {selection_product<float>(), selection_product<bf16>(), selection_product<fp16>(), selection_product<double>()},
    above<float>,
    above<double>,
    scale<float>,
    scale<double>,
};

}  // namespace peft_kernels
