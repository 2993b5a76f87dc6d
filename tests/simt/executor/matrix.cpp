// ldmatrix and mma.sync; the fragments' layouts are described in csrc/cuda/ptx/matrix.h and the PTX manual.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cmath>
#include <cstring>

#include "memory.h"
#include "report.h"
#include "warp.h"

namespace simt {

namespace {

struct Load {
  uint32_t* matrices;
  int count;
  bool transposed;
  const void* row;
  uint32_t pc;
};

struct Product {
  MatrixType type;
  float* sums;
  const uint32_t* left;
  const uint32_t* right;
};

// `bytes` at column `column` of a matrix's row, read in the name of the lane that receives them: its address is
// another lane's, but what must be ordered before this read is the receiver's business.
void read_for(Thread& receiver, const Load& load, const char* address, size_t bytes, void* to) {
  Thread* const running = machine.current;
  machine.current = &receiver;
  check_access_from(reinterpret_cast<uintptr_t>(address), bytes, Use::read, load.pc);
  machine.current = running;
  std::memcpy(to, address, bytes);
}

void load_for_all(void* const* payloads, unsigned) {
  const Load& any = *static_cast<const Load*>(payloads[0]);
  const auto load_of = [&](int lane) -> const Load& { return *static_cast<const Load*>(payloads[lane]); };
  for (int lane = 0; lane < 8 * any.count; ++lane) {
    const auto row = reinterpret_cast<uintptr_t>(load_of(lane).row);
    check_alignment(row, 16, any.pc);
    if (!is_shared(row)) violation("out-of-bounds shared read", "a row of ldmatrix is not in shared memory", any.pc);
  }
  Thread* const warp = &machine.threads[own_warp_index() * kLanes];
  for (int matrix = 0; matrix < any.count; ++matrix) {
    const auto row = [&](int i) { return static_cast<const char*>(load_of(8 * matrix + i).row); };
    for (int lane = 0; lane < kLanes; ++lane) {
      const int group = lane / 4, t = lane % 4;
      uint16_t pair[2];
      if (any.transposed) {
        for (int i = 0; i < 2; ++i) read_for(warp[lane], any, row(2 * t + i) + 2 * group, 2, &pair[i]);
      } else {
        read_for(warp[lane], any, row(group) + 4 * t, 4, pair);
      }
      std::memcpy(&load_of(lane).matrices[matrix], pair, 4);
    }
  }
}

// Element `half` of a register that holds two of 16 bits.
float half_of(MatrixType type, uint32_t bits, int half) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  const auto value = static_cast<uint16_t>(bits >> (16 * half));
  return type == MatrixType::bf16 ? static_cast<float>(BFloat16(value, BFloat16::from_bits()))
                                  : static_cast<float>(Half(value, Half::from_bits()));
}

// The hardware ignores the low 13 bits of a tf32 operand.
float tf32_of(uint32_t bits) { return std::bit_cast<float>(bits & 0xFFFFE000u); }

// Tensor cores do not round their sums, they cut them off: errors of one sign, which a kernel with a long depth shows.
// (Hardware cuts a few bits more, at the largest of its terms.)
float cut(double sum) {
  const auto rounded = static_cast<float>(sum);
  return std::abs(double{rounded}) > std::abs(sum) ? std::nextafter(rounded, 0.0f) : rounded;
}

void multiply_for_all(void* const* payloads, unsigned) {
  float left[16][16] = {}, right[16][8] = {};
  const MatrixType type = static_cast<const Product*>(payloads[0])->type;
  const int depth = type == MatrixType::tf32 ? 8 : 16;
  for (int lane = 0; lane < kLanes; ++lane) {
    const Product& own = *static_cast<const Product*>(payloads[lane]);
    const int group = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8;
      if (type == MatrixType::tf32) {
        left[row][t + i / 2 * 4] = tf32_of(own.left[i]);
        if (i < 2) right[t + i * 4][group] = tf32_of(own.right[i]);
        continue;
      }
      for (int half = 0; half < 2; ++half) {
        left[row][2 * t + i / 2 * 8 + half] = half_of(type, own.left[i], half);
        if (i < 2) right[2 * t + i * 8 + half][group] = half_of(type, own.right[i], half);
      }
    }
  }
  // Products of 8- and 11-bit significands are exact, and so are sums of sixteen of them, but for the last bits of
  // double.
  double product[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < 8; ++column) product[row][column] += double{left[row][k]} * right[k][column];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* sums = static_cast<const Product*>(payloads[lane])->sums;
    const int group = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) sums[i] = cut(sums[i] + product[group + i / 2 * 8][2 * t + i % 2]);
  }
}

constexpr unsigned kWholeWarp = ~0u;

}  // namespace

void load_matrices(uint32_t* matrices, int count, bool transposed, const void* row, Site site) {
  Load load = {matrices, count, transposed, row, relative_pc(__builtin_return_address(0))};
  meet(kLoadMatrices, kWholeWarp, &load, site, load_for_all);
}

void multiply(MatrixType type, float* sums, const uint32_t* left, const uint32_t* right, Site site) {
  Product product = {type, sums, left, right};
  meet(kMultiply, kWholeWarp, &product, site, multiply_for_all);
}

}  // namespace simt
