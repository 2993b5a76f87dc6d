// The raw-pointer kernels of the delta algebra for one instruction set; deltas.cpp and its neighbors compose and
// thread them.
//
// Values are worked on in float, or in double where one of a call's tensors holds doubles, a chunk of at most kRun at a
// time. The *key* of a value is the bit pattern of its magnitude, read as an integer: it orders as magnitudes do.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace peft_kernels {

constexpr int64_t kRun = 2048;
// Offsets are written a vector at a time: room for those of a run.
constexpr int64_t kOffsets = kRun + 16;

// Keys [prefix << (shift + bits), (prefix + 1) << (shift + bits)) are counted, in 2^bits bins of 2^shift keys.
struct Bins {
  int shift;
  int bits;
  uint64_t prefix;
  bool all;  // every key has this prefix
};

// What parameter competition balancing knows of one delta; see peft_kernels/reference/deltas.py.
struct Competition {
  double lowest, highest;    // that magnitudes are clamped to
  double threshold, winner;  // of the scores: below it the scale is 0, at the winner 1
  double weight;
};

struct DeltaKernels {
  // Indexed by dtype; to and from float or double, for any count.
  void (*widen[kDTypes][2])(const void* from, void* to, int64_t count);
  void (*narrow[kDTypes][2])(const void* from, void* to, int64_t count);

  // The offsets of what a mask of at most kRun keeps; returns how many. `offsets` has room for kOffsets.
  int64_t (*kept_offsets)(const bool* mask, int64_t count, int32_t* offsets);

  // All below: of float [0] or double [1].
  struct Arithmetic {
    // Increments the bin of each value; returns nothing, counts wrap at 2^32.
    void (*count)(const void* values, int64_t count, const Bins& bins, uint32_t* counts);
    // How many of `count` keys are at least, and how many are more than, `key`.
    int64_t (*at_least)(const void* keys, int64_t count, uint64_t key);
    // keys[i] = key of values[i], times factors[i] where there are any. Float keys have 32 bits, double ones 64.
    void (*keys)(const void* values, const void* factors, int64_t count, void* keys);
    // mask[i] = last < key or, for `with_ties`, last == key; and not so for first; and key != 0.
    void (*between)(
        const void* keys, int64_t count, uint64_t first, bool first_ties, uint64_t last, bool last_ties, bool* mask);
    void (*scale)(void* values, int64_t count, double factor);
    // merged = sum over d < deltas of weights[d] columns[d]; columns lie kRun values apart.
    void (*sum)(const void* columns, int64_t deltas, const double* weights, int64_t count, void* merged);
    // The same over those that agree with the sign of the whole sum, divided by the sum of their weights.
    void (*ties)(const void* columns, int64_t deltas, const double* weights, int64_t count, void* merged);
    // scores[d] of each column, again kRun apart.
    void (*scores)(const void* columns, int64_t deltas, const Competition* of, int64_t count, void* scores);
    // Merges by scores that the function above has left.
    void (*compete)(
        const void* columns, const void* scores, int64_t deltas, const Competition* of, int64_t count, void* merged);
    // Counts the scores of a delta's own entries, those not zero, by their ordered bit pattern; the largest of these.
    uint64_t (*count_scores)(
        const void* column, const void* scores, int64_t count, const Bins& bins, uint32_t* counts, uint64_t largest);
    // Moves merged values that are not zero to the front, their offsets in `offsets`; returns how many.
    int64_t (*gather_nonzero)(void* merged, int64_t count, int32_t* offsets);
  };
  Arithmetic in[2];
};

extern const DeltaKernels delta_kernels_baseline;
#if defined(__x86_64__)
extern const DeltaKernels delta_kernels_avx2;
extern const DeltaKernels delta_kernels_avx512;
#endif

// Those of the instruction set that is used.
const DeltaKernels& delta_kernels();

}  // namespace peft_kernels
