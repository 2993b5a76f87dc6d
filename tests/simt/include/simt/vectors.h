// dim3 and the vector types, with the alignments that make their accesses one instruction.
#pragma once

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define SIMT_VECTOR_2(name, type)         \
  struct alignas(2 * sizeof(type)) name { \
    type x, y;                            \
  };                                      \
  inline name make_##name(type x, type y) { return {x, y}; }
#define SIMT_VECTOR_4(name, type) \
  struct alignas(16) name {       \
    type x, y, z, w;              \
  };                              \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

SIMT_VECTOR_2(int2, int)
SIMT_VECTOR_2(uint2, unsigned)
SIMT_VECTOR_2(float2, float)
SIMT_VECTOR_4(int4, int)
SIMT_VECTOR_4(uint4, unsigned)
SIMT_VECTOR_4(float4, float)
