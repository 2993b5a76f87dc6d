// The kernels of the sampled product for one instruction set. Compiled once per capability with
// -DPK_CAPABILITY=<name>; see simd.h.
//
// An entry takes M multiply-adds and reads M elements of a column of x, out of a block that stays in L2; the column of
// grad_out is shared by the entries of a row, several of which are summed at a time. So a load per multiply-add bounds
// the dot products, and a shuffle per element of a transposed vector the transposition.
#include "sampled_kernels.h"
#include "simd.h"

#if !defined(PK_CAPABILITY)
#error "compile with -DPK_CAPABILITY=baseline|avx2|avx512|avx512bf16"
#endif

namespace peft_kernels {
namespace {

constexpr int kEntries = 8;        // entries of a row summed at a time
constexpr int64_t kNarrow = 128;   // columns
constexpr int64_t kManyRows = 32;  // transposed side by side

// --- transposition of as many vectors as a vector has lanes, in place ---

#if defined(__AVX512F__)

// Quarters: out[4 q + j] = quarter q of rows j, j + step, j + 2 step, j + 3 step.
template <int step>
inline void transpose_quarters(const __m512* from, __m512* to) {
#pragma GCC unroll 4
  for (int j = 0; j < step; ++j) {
    const __m512 low01 = _mm512_shuffle_f32x4(from[j], from[j + step], 0x44);
    const __m512 high01 = _mm512_shuffle_f32x4(from[j], from[j + step], 0xEE);
    const __m512 low23 = _mm512_shuffle_f32x4(from[j + 2 * step], from[j + 3 * step], 0x44);
    const __m512 high23 = _mm512_shuffle_f32x4(from[j + 2 * step], from[j + 3 * step], 0xEE);
    to[j] = _mm512_shuffle_f32x4(low01, low23, 0x88);
    to[step + j] = _mm512_shuffle_f32x4(low01, low23, 0xDD);
    to[2 * step + j] = _mm512_shuffle_f32x4(high01, high23, 0x88);
    to[3 * step + j] = _mm512_shuffle_f32x4(high01, high23, 0xDD);
  }
}

inline void transpose_lanes(FloatVector* rows) {
  __m512 fours[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512 row0 = (__m512)rows[i], row1 = (__m512)rows[i + 1], row2 = (__m512)rows[i + 2],
                 row3 = (__m512)rows[i + 3];
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(row0, row1));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(row0, row1));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(row2, row3));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(row2, row3));
    fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
    fours[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    fours[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
    fours[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
  }
  transpose_quarters<4>(fours, (__m512*)rows);
}

inline void transpose_lanes(DoubleVector* rows) {
  __m512 twos[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    twos[i] = _mm512_castpd_ps(_mm512_unpacklo_pd((__m512d)rows[i], (__m512d)rows[i + 1]));
    twos[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd((__m512d)rows[i], (__m512d)rows[i + 1]));
  }
  __m512 columns[8];
  transpose_quarters<2>(twos, columns);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) rows[i] = (DoubleVector)columns[i];
}

#elif defined(__AVX2__)

template <int step>
inline void transpose_halves(const __m256* from, __m256* to) {
#pragma GCC unroll 4
  for (int j = 0; j < step; ++j) {
    to[j] = _mm256_permute2f128_ps(from[j], from[j + step], 0x20);
    to[step + j] = _mm256_permute2f128_ps(from[j], from[j + step], 0x31);
  }
}

inline void transpose_lanes(FloatVector* rows) {
  __m256 fours[8], columns[8];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const __m256 row0 = (__m256)rows[i], row1 = (__m256)rows[i + 1], row2 = (__m256)rows[i + 2],
                 row3 = (__m256)rows[i + 3];
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(row0, row1));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(row0, row1));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(row2, row3));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(row2, row3));
    fours[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
    fours[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
    fours[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
    fours[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
  }
  transpose_halves<4>(fours, columns);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) rows[i] = (FloatVector)columns[i];
}

inline void transpose_lanes(DoubleVector* rows) {
  __m256 twos[4], columns[4];
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    twos[i] = _mm256_castpd_ps(_mm256_unpacklo_pd((__m256d)rows[i], (__m256d)rows[i + 1]));
    twos[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd((__m256d)rows[i], (__m256d)rows[i + 1]));
  }
  transpose_halves<2>(twos, columns);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) rows[i] = (DoubleVector)columns[i];
}

#else

template <typename V>
inline void transpose_lanes(V* rows) {
  constexpr int lanes = sizeof(V) / sizeof(rows[0][0]);
  for (int i = 0; i < lanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const auto value = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = value;
    }
  }
}

#endif

// --- what a transposed column holds, and how two of them are multiplied ---

// Activations as numbers of the accumulation type.
template <typename T>
struct Columns {
  using acc = typename Accumulate<T>::type;
  using Element = acc;
  static constexpr int kElements = kLanes<acc>;

  // Rows first to first + kElements of kElements columns from `from` on; `rows` and `columns` of them exist.
  static void transpose(const T* from, int64_t row_stride, int64_t rows, int64_t columns, Element* to, int64_t stride) {
    Vector<acc> block[kElements];
    if (rows >= kElements && columns >= kElements) {
#pragma GCC unroll 16
      for (int i = 0; i < kElements; ++i) block[i] = load_vector(from + i * row_stride);
    } else {
      const int count = static_cast<int>(smaller(kElements, columns));
      for (int i = 0; i < kElements; ++i) {
        block[i] = i < rows ? load_partial(from + i * row_stride, count) : Vector<acc>{};
      }
    }
    transpose_lanes(block);
    if (columns >= kElements) {
#pragma GCC unroll 16
      for (int i = 0; i < kElements; ++i) store_vector(to + i * stride, block[i]);
    } else {
      for (int i = 0; i < columns; ++i) store_vector(to + i * stride, block[i]);
    }
  }

  using Loaded = Vector<acc>;
  static Loaded load(const Element* from) { return load_vector(from); }
  static void multiply_add(Vector<acc>& sum, Loaded left, Loaded right) { sum += left * right; }
};

#if defined(__AVX512BF16__)
// bfloat16 as it is: pairs of neighbours in M are multiplied at once.
template <>
struct Columns<bf16> {
  using acc = float;
  using Element = bf16;
  static constexpr int kElements = 32;

  static __m512i load_row(const bf16* from, int64_t columns) {
    const __mmask32 exist = columns >= 32 ? 0xFFFFFFFFu : (1u << columns) - 1u;
    return _mm512_maskz_loadu_epi16(exist, from);
  }

  static void transpose(
      const bf16* from, int64_t row_stride, int64_t rows, int64_t columns, Element* to, int64_t stride) {
    // Pairs of rows make 32-bit entries: of columns 8 q to 8 q + 3 in the quarters of `low`, of 8 q + 4 to 8 q + 7 in
    // those of `high`.
    FloatVector low[16], high[16];
    if (rows >= kElements && columns >= kElements) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const __m512i even = _mm512_loadu_si512(from + 2 * i * row_stride);
        const __m512i odd = _mm512_loadu_si512(from + (2 * i + 1) * row_stride);
        low[i] = (FloatVector)_mm512_unpacklo_epi16(even, odd);
        high[i] = (FloatVector)_mm512_unpackhi_epi16(even, odd);
      }
    } else {
      for (int i = 0; i < 16; ++i) {
        const __m512i zero = _mm512_setzero_si512();
        const __m512i even = 2 * i < rows ? load_row(from + 2 * i * row_stride, columns) : zero;
        const __m512i odd = 2 * i + 1 < rows ? load_row(from + (2 * i + 1) * row_stride, columns) : zero;
        low[i] = (FloatVector)_mm512_unpacklo_epi16(even, odd);
        high[i] = (FloatVector)_mm512_unpackhi_epi16(even, odd);
      }
    }
    transpose_lanes(low);
    transpose_lanes(high);
    if (columns >= kElements) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        store_unaligned(to + (i / 4 * 8 + i % 4) * stride, low[i]);
        store_unaligned(to + (i / 4 * 8 + i % 4 + 4) * stride, high[i]);
      }
    } else {
      for (int c = 0; c < columns; ++c) {
        store_unaligned(to + c * stride, (c & 4 ? high : low)[c / 8 * 4 + c % 4]);
      }
    }
  }

  using Loaded = __m512bh;
  static Loaded load(const Element* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static void multiply_add(FloatVector& sum, Loaded left, Loaded right) {
    sum = (FloatVector)_mm512_dpbf16_ps((__m512)sum, left, right);
  }
};
#endif

template <typename T>
void transpose(
    const Matrix& matrix, int64_t first, int64_t rows, int64_t begin, int64_t end, void* columns, int64_t stride) {
  using Element = typename Columns<T>::Element;
  constexpr int64_t width = Columns<T>::kElements;
  const T* data = static_cast<const T*>(matrix.data) + first * matrix.row_stride;
  Element* to = static_cast<Element*>(columns);
  // Along the rows, which is how memory likes to be read. 32 of them side by side are more streams than a processor
  // follows by itself: lines are asked for ahead, those of the next rows, or, where the range is narrow, of the columns
  // after it, which usually come next. Addresses beyond the matrix are harmless, a prefetch never faults.
  const int64_t ahead = end - begin > kNarrow ? width * matrix.row_stride : end - begin;
  for (int64_t m = 0; m < rows; m += width) {
    for (int64_t c = begin; c < end; c += width) {
      if constexpr (width >= kManyRows) {
        const T* next = data + m * matrix.row_stride + c + ahead;
        for (int64_t i = 0; i < width; ++i) __builtin_prefetch(next + i * matrix.row_stride, 0, 2);
      }
      Columns<T>::transpose(
          data + m * matrix.row_stride + c, matrix.row_stride, rows - m, end - c, to + (c - begin) * stride + m,
          stride);
    }
  }
}

// --- the dot products ---

typedef float QuarterFloats __attribute__((vector_size(16)));
typedef double QuarterDoubles __attribute__((vector_size(16)));

inline float sum_of(QuarterFloats v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline double sum_of(QuarterDoubles v) { return v[0] + v[1]; }

#if defined(__AVX512F__)
inline __m256 add_halves(__m512 v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
inline __m256d add_halves(__m512d v) { return _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1)); }
#endif
#if defined(__AVX2__)
inline __m128 add_halves(__m256 v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
inline __m128d add_halves(__m256d v) { return _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1)); }
#endif

inline float sum_of_lanes(FloatVector v) {
#if defined(__AVX512F__)
  return sum_of((QuarterFloats)add_halves(add_halves((__m512)v)));
#elif defined(__AVX2__)
  return sum_of((QuarterFloats)add_halves((__m256)v));
#else
  return sum_of(v);
#endif
}

inline double sum_of_lanes(DoubleVector v) {
#if defined(__AVX512F__)
  return sum_of((QuarterDoubles)add_halves(add_halves((__m512d)v)));
#elif defined(__AVX2__)
  return sum_of((QuarterDoubles)add_halves((__m256d)v));
#else
  return sum_of(v);
#endif
}

template <int I, typename T, typename Index>
inline void dot_entries(
    const typename Columns<T>::Element* left, const typename Columns<T>::Element* columns, int64_t stride,
    int64_t depth, const Index* indices, int64_t base, typename Columns<T>::acc* sums) {
  using Traits = Columns<T>;
  const typename Traits::Element* column[I];
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i) column[i] = columns + (static_cast<int64_t>(indices[i]) - base) * stride;
  Vector<typename Traits::acc> sum[I] = {};
  for (int64_t m = 0; m < depth; m += Traits::kElements) {
    const typename Traits::Loaded shared = Traits::load(left + m);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) Traits::multiply_add(sum[i], shared, Traits::load(column[i] + m));
  }
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i) sums[i] += sum_of_lanes(sum[i]);
}

template <typename T, typename Index>
void dot(
    const void* left, const void* columns, int64_t stride, int64_t depth, const Index* indices, int64_t base,
    int64_t count, void* sums) {
  using Element = typename Columns<T>::Element;
  using acc = typename Columns<T>::acc;
  const Element* shared = static_cast<const Element*>(left);
  const Element* block = static_cast<const Element*>(columns);
  acc* to = static_cast<acc*>(sums);
  for (; count >= kEntries; count -= kEntries, indices += kEntries, to += kEntries) {
    dot_entries<kEntries, T>(shared, block, stride, depth, indices, base, to);
  }
  if (count >= 4) {
    dot_entries<4, T>(shared, block, stride, depth, indices, base, to);
    count -= 4, indices += 4, to += 4;
  }
  if (count == 3) {
    dot_entries<3, T>(shared, block, stride, depth, indices, base, to);
  } else if (count == 2) {
    dot_entries<2, T>(shared, block, stride, depth, indices, base, to);
  } else if (count == 1) {
    dot_entries<1, T>(shared, block, stride, depth, indices, base, to);
  }
}

}  // namespace

#define PK_CONCATENATE(a, b) a##b
#define PK_TABLE_NAME(capability) PK_CONCATENATE(sampled_kernels_, capability)

template <typename T>
constexpr SampledKernel sampled_kernel() {
  return {
      sizeof(typename Columns<T>::Element), Columns<T>::kElements, transpose<T>, dot<T, int32_t>, dot<T, int64_t>,
  };
}

const SampledKernels PK_TABLE_NAME(PK_CAPABILITY) = {
    {sampled_kernel<float>(), sampled_kernel<bf16>(), sampled_kernel<fp16>(), sampled_kernel<double>()},
};

}  // namespace peft_kernels
