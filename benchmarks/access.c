// The memory traffic of a scattered write, and nothing else: what scatter_write_ cannot be faster than on this machine.
// Every thread walks its share of the sorted positions, reads the streams and writes an element of the weight for each,
// asking for its line well ahead, as any implementation may.
#include <stdint.h>

#define AHEAD 64

#define DEFINE(NAME, ELEMENT)                                                                                       \
  void NAME(ELEMENT* weight, const int32_t* indices, const ELEMENT* original, const float* values, int64_t count) { \
    _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < count; ++i) {                              \
      if (i + AHEAD < count) __builtin_prefetch(weight + indices[i + AHEAD], 1);                                    \
      weight[indices[i]] = (ELEMENT)(original[i] + (ELEMENT)values[i]);                                             \
    }                                                                                                               \
  }

DEFINE(write_16, uint16_t)
DEFINE(write_32, float)
