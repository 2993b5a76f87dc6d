// Philox4x32-10 dropout masks: the layout of peft_kernels/reference/philox.py, shared by host and device code.
//
// Row m owns the stream of 16-bit numbers that Philox yields for counters (g, m, offset_low, offset_high),
// g = 0, 1, ...; element (m, c) takes number c % 8 of group g = c / 8 and is kept when it is at least the threshold.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PK_HOST_DEVICE static inline
#endif

namespace peft_kernels {

struct RngState {
  int64_t seed;
  int64_t offset;
};

// Elements decided by one Philox call: four 32-bit words, two elements each.
constexpr int kPhiloxGroup = 8;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// The number below which a 16-bit draw drops its element: dropout_p in units of 2^-16, rounded to nearest.
PK_HOST_DEVICE uint32_t dropout_threshold(double dropout_p) { return static_cast<uint32_t>(dropout_p * 65536.0 + 0.5); }

// The factor on kept elements; 0 at p = 1, where nothing is kept.
PK_HOST_DEVICE double dropout_scale(double dropout_p) { return dropout_p < 1.0 ? 1.0 / (1.0 - dropout_p) : 0.0; }

// The four words that decide elements [8 * group, 8 * group + 8) of a row.
PK_HOST_DEVICE void philox_4x32_10(RngState state, uint32_t group, uint32_t row, uint32_t words[4]) {
  uint32_t c0 = group;
  uint32_t c1 = row;
  uint32_t c2 = static_cast<uint32_t>(state.offset);
  uint32_t c3 = static_cast<uint32_t>(static_cast<uint64_t>(state.offset) >> 32);
  uint32_t k0 = static_cast<uint32_t>(state.seed);
  uint32_t k1 = static_cast<uint32_t>(static_cast<uint64_t>(state.seed) >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// The 16-bit number of element `lane` (0..7) of a group.
PK_HOST_DEVICE uint32_t philox_draw(const uint32_t words[4], int lane) {
  return (words[lane >> 1] >> ((lane & 1) * 16)) & 0xFFFFu;
}

}  // namespace peft_kernels
