// The delta algebra for one instruction set. Compiled once per capability with -DPK_CAPABILITY=<name>; see simd.h.
//
// Everything here is a plain loop over a chunk in the first-level cache, which compilers turn into vectors, and is
// rounded operation by operation (-ffp-contract=off): the same bits with every instruction set. Memory bounds the
// merges: a dense delta costs 2 or 4 bytes per position, a packed one 4 and a value per entry, the result the same.
// Counting costs an increment of a bin in the second-level cache per value.
#include "delta_kernels.h"
#include "simd.h"

#if !defined(PK_CAPABILITY)
#error "compile with -DPK_CAPABILITY=baseline|avx2|avx512"
#endif

namespace peft_kernels {
namespace {

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;
template <typename T>
constexpr bool kHalf = kSame<T, bf16> || kSame<T, fp16>;

template <typename acc>
struct BitsOf {
  using type = uint32_t;
  using integer = int32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
  using integer = int64_t;
};
template <typename acc>
using Bits = typename BitsOf<acc>::type;

template <typename acc>
inline Bits<acc> bits_of(acc value) {
  Bits<acc> bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
template <typename acc>
inline acc from_bits(Bits<acc> bits) {
  acc value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
template <typename acc>
constexpr Bits<acc> kSign = Bits<acc>(1) << (sizeof(acc) * 8 - 1);

template <typename acc>
inline Bits<acc> key_of(acc value) {
  return bits_of(value) & ~kSign<acc>;
}

template <typename Half>
void half_to_float(const Half* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<float> <= count; i += kLanes<float>) store_vector(to + i, load_vector(from + i));
  if (i < count)
    store_partial(to + i, load_partial(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
}

template <typename Half>
void float_to_half(const float* from, Half* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<float> <= count; i += kLanes<float>) store_vector(to + i, load_vector(from + i));
  if (i < count)
    store_partial(to + i, load_partial(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
}

template <typename From, typename acc>
void widen(const void* from, void* to, int64_t count) {
  const From* source = static_cast<const From*>(from);
  acc* target = static_cast<acc*>(to);
  if constexpr (kHalf<From> && kSame<acc, double>) {
    float between[kRun];
    for (int64_t first = 0; first < count; first += kRun) {
      const int64_t some = count - first < kRun ? count - first : kRun;
      half_to_float(source + first, between, some);
      for (int64_t i = 0; i < some; ++i) target[first + i] = between[i];
    }
  } else if constexpr (kHalf<From>) {
    half_to_float(source, target, count);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i] = static_cast<acc>(source[i]);
  }
}

template <typename To, typename acc>
void narrow(const void* from, void* to, int64_t count) {
  const acc* source = static_cast<const acc*>(from);
  To* target = static_cast<To*>(to);
  if constexpr (kHalf<To> && kSame<acc, double>) {  // by way of float, as torch does
    float between[kRun];
    for (int64_t first = 0; first < count; first += kRun) {
      const int64_t some = count - first < kRun ? count - first : kRun;
      for (int64_t i = 0; i < some; ++i) between[i] = static_cast<float>(source[first + i]);
      float_to_half(between, target + first, some);
    }
  } else if constexpr (kHalf<To>) {
    float_to_half(source, target, count);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i] = static_cast<To>(source[i]);
  }
}

template <typename Key>
inline void count_keys(const Key* keys, int64_t count, const Bins& bins, uint32_t* counts) {
  const Key last = static_cast<Key>((uint64_t(1) << bins.bits) - 1);
  const int shift = bins.shift, above = bins.shift + bins.bits;
  if (bins.all) {
    for (int64_t i = 0; i < count; ++i) ++counts[(keys[i] >> shift) & last];
    return;
  }
  // Few keys have the prefix: whole groups are passed over.
  constexpr int64_t kGroup = 32;
  const Key prefix = static_cast<Key>(bins.prefix);
  for (int64_t first = 0; first < count; first += kGroup) {
    const int64_t end = count - first < kGroup ? count : first + kGroup;
    Key found = 0;
    for (int64_t i = first; i < end; ++i) found |= static_cast<Key>((keys[i] >> above) == prefix);
    if (found == 0) continue;
    for (int64_t i = first; i < end; ++i) {
      if ((keys[i] >> above) == prefix) ++counts[(keys[i] >> shift) & last];
    }
  }
}

template <typename acc>
void make_keys(const void* values, const void* factors, int64_t count, void* keys) {
  const acc* from = static_cast<const acc*>(values);
  const acc* by = static_cast<const acc*>(factors);
  Bits<acc>* to = static_cast<Bits<acc>*>(keys);
  if (by == nullptr) {
    for (int64_t i = 0; i < count; ++i) to[i] = key_of(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = key_of(from[i] * by[i]);
  }
}

template <typename acc>
void count_values(const void* values, int64_t count, const Bins& bins, uint32_t* counts) {
  Bits<acc> keys[kRun];
  make_keys<acc>(values, nullptr, count, keys);
  count_keys(keys, count, bins, counts);
}

template <typename acc>
int64_t at_least(const void* keys, int64_t count, uint64_t key) {
  using Key = Bits<acc>;
  const Key* from = static_cast<const Key*>(keys);
  const Key bound = static_cast<Key>(key);
  int64_t total = 0;
  for (int64_t first = 0; first < count; first += kRun) {  // partial sums as narrow as keys make the wider vectors
    const int64_t end = count - first < kRun ? count : first + kRun;
    Key some = 0;
    for (int64_t i = first; i < end; ++i) some += static_cast<Key>(from[i] >= bound);
    total += static_cast<int64_t>(some);
  }
  return total;
}

template <typename acc>
void between(
    const void* keys, int64_t count, uint64_t first, bool first_ties, uint64_t last, bool last_ties, bool* mask) {
  using Key = Bits<acc>;
  const Key* from = static_cast<const Key*>(keys);
  // In the top: key >= bound, where ties are in; without them key > bound, which is key >= bound + 1.
  const Key low = static_cast<Key>(last) + static_cast<Key>(!last_ties);
  const Key high = static_cast<Key>(first) + static_cast<Key>(!first_ties);
  uint8_t* to = reinterpret_cast<uint8_t*>(mask);
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<uint8_t>((from[i] >= low) & (from[i] < high) & (from[i] != 0));
  }
}

template <typename acc>
void scale_values(void* values, int64_t count, double factor) {
  acc* v = static_cast<acc*>(values);
  const acc by = static_cast<acc>(factor);
  for (int64_t i = 0; i < count; ++i) v[i] *= by;
}

template <typename acc>
inline const acc* column(const void* columns, int64_t d) {
  return static_cast<const acc*>(columns) + d * kRun;
}

template <typename acc>
void sum_columns(const void* columns, int64_t deltas, const double* weights, int64_t count, void* merged) {
  acc* to = static_cast<acc*>(merged);
  for (int64_t d = 0; d < deltas; ++d) {
    const acc* from = column<acc>(columns, d);
    const acc weight = static_cast<acc>(weights[d]);
    if (d == 0) {
      for (int64_t i = 0; i < count; ++i) to[i] = weight * from[i];
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] += weight * from[i];
    }
  }
}

template <typename acc>
void ties(const void* columns, int64_t deltas, const double* weights, int64_t count, void* merged) {
  acc* to = static_cast<acc*>(merged);
  acc mass[kRun], share[kRun];
  sum_columns<acc>(columns, deltas, weights, count, mass);
  for (int64_t i = 0; i < count; ++i) to[i] = share[i] = acc(0);
  for (int64_t d = 0; d < deltas; ++d) {
    const acc* from = column<acc>(columns, d);
    const acc weight = static_cast<acc>(weights[d]);
    for (int64_t i = 0; i < count; ++i) {
      const acc aligned = mass[i] >= acc(0) ? from[i] : -from[i];
      to[i] += aligned > acc(0) ? weight * from[i] : acc(0);
      share[i] += aligned > acc(0) ? weight : acc(0);
    }
  }
  for (int64_t i = 0; i < count; ++i) to[i] = share[i] > acc(0) ? to[i] / share[i] : acc(0);
}

// e^x - 1 as 2^k and the rest: x = k ln 2 + r with |r| <= ln 2 / 2, and e^r - 1 by its series, whose next term is below
// half a unit in the last place. For |x| up to 80.
template <typename acc>
struct Exponential {
  acc power;      // 2^k
  acc remainder;  // e^r - 1
};

template <typename acc>
inline Exponential<acc> exponential(acc x) {
  constexpr bool kWide = kSame<acc, double>;
  // Adding this leaves the nearest integer in the low bits.
  constexpr acc kRound = kWide ? acc(6755399441055744.0) : acc(12582912.0);
  constexpr acc kInverse = acc(1.4426950408889634074);
  constexpr acc kHigh = kWide ? acc(6.93147180369123816490e-01) : acc(0.693359375);
  constexpr acc kLow = kWide ? acc(1.90821492927058770002e-10) : acc(-2.12194440e-4);
  constexpr int kTerms = kWide ? 14 : 7;
  constexpr acc kFactors[] = {
      1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,        1.0 / 5040,
      1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800, 1.0 / 87178291200};
  constexpr int kMantissa = kWide ? 52 : 23;
  constexpr int kBias = kWide ? 1023 : 127;
  const acc shifted = x * kInverse + kRound;
  const acc k = shifted - kRound;
  const acc r = (x - k * kHigh) - k * kLow;
  acc series = kFactors[kTerms - 1];
#pragma GCC unroll 16
  for (int n = kTerms - 2; n >= 0; --n) series = kFactors[n] + r * series;
  const Bits<acc> exponent = bits_of(shifted) - bits_of(kRound) + Bits<acc>(kBias);
  return {from_bits<acc>(exponent << kMantissa), r * series};
}

template <typename acc>
inline acc clamped(acc value, acc low, acc high) {
  const acc raised = value < low ? low : value;
  return raised > high ? high : raised;
}

template <typename acc>
void scores(const void* columns, int64_t deltas, const Competition* of, int64_t count, void* scores) {
  acc total[kRun];
  for (int64_t i = 0; i < count; ++i) total[i] = column<acc>(columns, 0)[i];
  for (int64_t d = 1; d < deltas; ++d) {
    const acc* from = column<acc>(columns, d);
    for (int64_t i = 0; i < count; ++i) total[i] += from[i];
  }
  for (int64_t d = 0; d < deltas; ++d) {
    const acc* from = column<acc>(columns, d);
    acc* to = static_cast<acc*>(scores) + d * kRun;
    const acc low = static_cast<acc>(of[d].lowest), high = static_cast<acc>(of[d].highest);
    const acc width = high - low, n = static_cast<acc>(deltas);
    for (int64_t i = 0; i < count; ++i) {
      const acc magnitude = clamped(from_bits<acc>(key_of(from[i])), low, high);
      const acc norm = width > acc(0) ? (magnitude - low) / width : acc(0);
      const Exponential<acc> intra = exponential(n * (norm * norm));
      const acc product = from[i] * total[i];
      const Exponential<acc> inter = exponential(acc(2) * clamped(product, acc(-20), acc(20)));
      const acc less_one = inter.power * inter.remainder + (inter.power - acc(1));
      const acc tanh = less_one / (less_one + acc(2));
      to[i] = (intra.power + intra.power * intra.remainder) * tanh + acc(0);
    }
  }
}

template <typename acc>
void compete(
    const void* columns, const void* scores, int64_t deltas, const Competition* of, int64_t count, void* merged) {
  acc* to = static_cast<acc*>(merged);
  acc share[kRun];
  for (int64_t i = 0; i < count; ++i) to[i] = share[i] = acc(0);
  for (int64_t d = 0; d < deltas; ++d) {
    const acc* from = column<acc>(columns, d);
    const acc* score = column<acc>(scores, d);
    const acc low = static_cast<acc>(of[d].lowest), high = static_cast<acc>(of[d].highest);
    const acc threshold = static_cast<acc>(of[d].threshold), weight = static_cast<acc>(of[d].weight);
    const acc range = static_cast<acc>(of[d].winner) - threshold;
    for (int64_t i = 0; i < count; ++i) {
      const acc magnitude = clamped(from_bits<acc>(key_of(from[i])), low, high);
      const acc signed_magnitude = from[i] < acc(0) ? -magnitude : magnitude;
      const acc value = from[i] != acc(0) ? signed_magnitude : acc(0);
      const acc above = score[i] > threshold ? score[i] - threshold : acc(0);
      const acc scale = range > acc(0) ? above / range : acc(0);
      to[i] += weight * (value * scale);
      share[i] += scale;
    }
  }
  for (int64_t i = 0; i < count; ++i) to[i] /= share[i] > acc(1e-12) ? share[i] : acc(1e-12);
}

// Bit patterns that order as the numbers do, negative ones included.
template <typename acc>
inline Bits<acc> ordered(acc value) {
  const Bits<acc> bits = bits_of(value);
  return bits & kSign<acc> ? ~bits : bits | kSign<acc>;
}

template <typename acc>
uint64_t count_scores(
    const void* column, const void* scores, int64_t count, const Bins& bins, uint32_t* counts, uint64_t largest) {
  const acc* values = static_cast<const acc*>(column);
  const acc* from = static_cast<const acc*>(scores);
  Bits<acc> keys[kRun];
  int64_t own = 0;
  Bits<acc> most = static_cast<Bits<acc>>(largest);
  for (int64_t i = 0; i < count; ++i) {
    keys[own] = ordered(from[i]);
    own += values[i] != acc(0);
  }
  for (int64_t i = 0; i < own; ++i) most = keys[i] > most ? keys[i] : most;
  count_keys(keys, own, bins, counts);
  return most;
}

int64_t kept_offsets(const bool* mask, int64_t count, int32_t* offsets) {
  int64_t kept = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= count; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask + i));
    const __mmask16 bits = _mm_test_epi8_mask(bytes, bytes);
    const __m512i here = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(i)));
    _mm512_storeu_si512(offsets + kept, _mm512_maskz_compress_epi32(bits, here));
    kept += __builtin_popcount(bits);
  }
#elif __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  for (; i + 8 <= count; i += 8) {
    uint64_t bytes;
    std::memcpy(&bytes, mask + i, sizeof(bytes));
    for (; bytes != 0; bytes &= bytes - 1) {
      offsets[kept++] = static_cast<int32_t>(i) + __builtin_ctzll(bytes) / 8;
    }
  }
#endif
  for (; i < count; ++i) {
    offsets[kept] = static_cast<int32_t>(i);
    kept += mask[i];
  }
  return kept;
}

template <typename acc>
int64_t gather_nonzero(void* merged, int64_t count, int32_t* offsets) {
  acc* values = static_cast<acc*>(merged);
  bool mask[kRun];
  for (int64_t i = 0; i < count; ++i) mask[i] = values[i] != acc(0);
  const int64_t kept = kept_offsets(mask, count, offsets);
  for (int64_t i = 0; i < kept; ++i) values[i] = values[offsets[i]];
  return kept;
}

}  // namespace

#define PK_CONCATENATE(a, b) a##b
#define PK_TABLE_NAME(capability) PK_CONCATENATE(delta_kernels_, capability)

#define PK_FOR_DTYPES(kernel)                                                                   \
  {                                                                                             \
    {kernel<float, float>, kernel<float, double>}, {kernel<bf16, float>, kernel<bf16, double>}, \
        {kernel<fp16, float>, kernel<fp16, double>}, {                                          \
      kernel<double, float>, kernel<double, double>                                             \
    }                                                                                           \
  }
#define PK_ARITHMETIC(acc)                                                                                    \
  {count_values<acc>, at_least<acc>, make_keys<acc>, between<acc>,      scale_values<acc>,  sum_columns<acc>, \
   ties<acc>,         scores<acc>,   compete<acc>,   count_scores<acc>, gather_nonzero<acc>}

const DeltaKernels PK_TABLE_NAME(PK_CAPABILITY) = {
    PK_FOR_DTYPES(widen), PK_FOR_DTYPES(narrow), kept_offsets, {PK_ARITHMETIC(float), PK_ARITHMETIC(double)}};

}  // namespace peft_kernels
