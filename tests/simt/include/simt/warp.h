// What the lanes of a warp do together.
#pragma once

SIMT_INLINE void __syncwarp(unsigned mask = ~0u, SIMT_HERE) { ::simt::warp_barrier(mask, SIMT_SITE); }
SIMT_INLINE unsigned __activemask(SIMT_HERE) { return ::simt::active_mask(SIMT_SITE); }

// Values of 4 and 8 bytes travel as 64 bits.
template <typename T>
SIMT_INLINE uint64_t simt_to_bits(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "the warp's intrinsics take values of 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
SIMT_INLINE T simt_from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

#define SIMT_SHUFFLE(name, kind, operand_type)                                                               \
  template <typename T>                                                                                      \
  SIMT_INLINE T name(unsigned mask, T value, operand_type operand, int width = 32, SIMT_HERE) {              \
    return simt_from_bits<T>(::simt::shuffle(                                                                \
        ::simt::ShuffleKind::kind, mask, simt_to_bits(value), static_cast<int>(operand), width, SIMT_SITE)); \
  }
SIMT_SHUFFLE(__shfl_sync, index, int)
SIMT_SHUFFLE(__shfl_up_sync, up, unsigned)
SIMT_SHUFFLE(__shfl_down_sync, down, unsigned)
SIMT_SHUFFLE(__shfl_xor_sync, exclusive_or, int)

SIMT_INLINE unsigned __ballot_sync(unsigned mask, int predicate, SIMT_HERE) {
  return ::simt::vote(::simt::VoteKind::ballot, mask, predicate, SIMT_SITE);
}
SIMT_INLINE int __any_sync(unsigned mask, int predicate, SIMT_HERE) {
  return static_cast<int>(::simt::vote(::simt::VoteKind::any, mask, predicate, SIMT_SITE));
}
SIMT_INLINE int __all_sync(unsigned mask, int predicate, SIMT_HERE) {
  return static_cast<int>(::simt::vote(::simt::VoteKind::all, mask, predicate, SIMT_SITE));
}

template <typename T>
SIMT_INLINE unsigned __match_any_sync(unsigned mask, T value, SIMT_HERE) {
  return ::simt::match_any(mask, simt_to_bits(value), SIMT_SITE);
}
template <typename T>
SIMT_INLINE unsigned __match_all_sync(unsigned mask, T value, int* predicate, SIMT_HERE) {
  return ::simt::match_all(mask, simt_to_bits(value), predicate, SIMT_SITE);
}

#define SIMT_REDUCE(name, type, kind)                                                                                  \
  SIMT_INLINE type name(unsigned mask, type value, SIMT_HERE) {                                                        \
    return static_cast<type>(::simt::reduce(::simt::ReduceKind::kind, mask, static_cast<unsigned>(value), SIMT_SITE)); \
  }
SIMT_REDUCE(__reduce_add_sync, int, add)
SIMT_REDUCE(__reduce_add_sync, unsigned, add)
SIMT_REDUCE(__reduce_min_sync, int, min_signed)
SIMT_REDUCE(__reduce_min_sync, unsigned, min)
SIMT_REDUCE(__reduce_max_sync, int, max_signed)
SIMT_REDUCE(__reduce_max_sync, unsigned, max)
SIMT_REDUCE(__reduce_and_sync, unsigned, bit_and)
SIMT_REDUCE(__reduce_or_sync, unsigned, bit_or)
SIMT_REDUCE(__reduce_xor_sync, unsigned, bit_xor)
