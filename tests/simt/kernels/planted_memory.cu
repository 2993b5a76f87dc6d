// Kernels with a bug in what they access; `variant` 1 has it. The comments mark where it must be reported.
#include "case.h"

CASE(store_past_the_end, 2, 64, 0) {
  const int64_t i = blockIdx.x * 64 + threadIdx.x;
  if (i < a.outputs + a.variant) {
    a.out<float>()[i] = 1.0f;  // BUG: store_past_the_end
  }
}

CASE(load_past_the_end, 2, 64, 0) {
  const int64_t i = blockIdx.x * 64 + threadIdx.x;
  float value = 0.0f;
  const bool inside = a.variant ? i <= a.inputs : i < a.inputs;
  if (inside) value = a.in<float>()[i];  // BUG: load_past_the_end
  if (i < a.outputs) a.out<float>()[i] = value;
}

// output is a window of a wider matrix, its columns side by side.
CASE(store_into_the_gap, 1, 32, 0) {
  const int columns = static_cast<int>(a.inputs);
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t rows = a.outputs / columns;
  for (int64_t row = 0; row < rows; ++row) {
    if (lane < columns + (row + 1 < rows && a.variant)) {
      a.out<float>()[row * a.output_row_stride + lane] = 2.0f;  // BUG: store_into_the_gap
    }
  }
}

CASE(vector_over_the_edge, 1, 1, 0) {
  const int64_t whole = a.inputs / 4 * 4;
  for (int64_t i = 0; i < whole + 4 * a.variant; i += 4) {
    const float4 value = *reinterpret_cast<const float4*>(a.in<float>() + i);  // BUG: vector_over_the_edge
    a.out<float>()[i / 4 % a.outputs] = value.x + value.w;
  }
}

// A struct whose members are used one by one is still one access.
struct alignas(16) Four {
  float values[4];
};

CASE(misaligned_vector, 1, 1, 0) {
  const Four four = *reinterpret_cast<const Four*>(a.in<float>() + a.variant);  // BUG: misaligned_vector
  a.out<float>()[0] = four.values[0] + four.values[1];
  a.out<float>()[1] = four.values[2] * four.values[3];
}

CASE(null_pointer, 1, 1, 0) {
  const float* from = a.variant ? nullptr : a.in<float>();
  a.out<float>()[0] = *from;  // BUG: null_pointer
}

CASE(static_shared_past_the_end, 1, 32, 0) {
  __shared__ float before[32];
  __shared__ float tile[32];
  __shared__ float after[32];
  const int lane = static_cast<int>(threadIdx.x);
  before[lane] = tile[lane] = after[lane] = 0.0f;
  if (lane == 31) tile[lane + a.variant] = 1.0f;  // BUG: static_shared_past_the_end
  a.out<float>()[lane] = tile[lane] + before[lane] + after[lane];
}

template <typename T>
__device__ void fill_template_tile(const CaseArguments& a) {
  __shared__ T first[32];
  __shared__ T second[32];
  const int lane = static_cast<int>(threadIdx.x);
  first[lane] = second[lane] = 1;
  if (lane == 0) first[-a.variant] = second[-a.variant] = 1;  // BUG: template_shared_before_the_start
  a.out<float>()[lane] = first[lane] + second[lane];
}

CASE(template_shared_before_the_start, 1, 32, 0) { fill_template_tile<float>(a); }

CASE(dynamic_shared_past_the_end, 1, 32, 128) {
  float* tile = dynamic_shared_memory<float>();
  const int lane = static_cast<int>(threadIdx.x);
  tile[lane] = 0.0f;
  if (lane == 31) tile[lane + a.variant] = 1.0f;  // BUG: dynamic_shared_past_the_end
  a.out<float>()[lane] = tile[lane];
}

CASE(uninitialised_shared, 1, 32, 0) {
  __shared__ float tile[32];
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 32 - a.variant) tile[lane] = 1.0f;
  __syncthreads();
  a.out<float>()[lane] = tile[31 - lane];  // BUG: uninitialised_shared
}

// What one block leaves behind is nothing that the next may count on.
CASE(shared_of_the_last_block, 2, 32, 0) {
  __shared__ float tile[32];
  const int lane = static_cast<int>(threadIdx.x);
  if (blockIdx.x == 0 || !a.variant) tile[lane] = 1.0f;
  a.out<float>()[blockIdx.x * 32 + lane] = tile[lane];  // BUG: shared_of_the_last_block
}

CASE(write_to_input, 1, 32, 0) {
  const int lane = static_cast<int>(threadIdx.x);
  if (a.variant) {
    const_cast<float*>(a.in<float>())[lane] = 0.0f;  // BUG: write_to_input
  }
  a.out<float>()[lane] = a.in<float>()[lane];
}

// The compiler expands these where it can, after the pass that watches accesses.
CASE(memcpy_past_the_end, 1, 1, 0) {
  __shared__ float tile[64];
  std::memcpy(tile, a.in<float>() + a.variant, sizeof(tile));  // BUG: memcpy_past_the_end
  a.out<float>()[0] = tile[63];
}

CASE(memset_past_the_end, 1, 1, 0) {
  __shared__ float tile[8];
  std::memset(tile + a.variant, 0, sizeof(tile));  // BUG: memset_past_the_end
  a.out<float>()[0] = tile[7];
}

CASE(memcpy_of_uninitialised, 1, 1, 0) {
  __shared__ float tile[3];
  tile[0] = tile[1] = 0.0f;
  if (!a.variant) tile[2] = 0.0f;
  std::memcpy(a.out<float>(), tile, sizeof(tile));  // BUG: memcpy_of_uninitialised
}

struct Large {
  float values[24];
};

CASE(struct_past_the_end, 1, 1, 0) {
  __shared__ Large tile;
  tile = *reinterpret_cast<const Large*>(a.in<float>() + 40 + a.variant);  // BUG: struct_past_the_end
  a.out<float>()[0] = tile.values[23];
}
