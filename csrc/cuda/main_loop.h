// The one main loop of the tensor-core kernels: sums [M, N] += left [M, depth] right [N, depth]^T for one block.
//
//     copies     |  tile 0  |  tile 1  |  tile 2  |  tile 3  |          kStages - 1 tiles ahead, by cp.async
//     fragments                        |  tile 0  |  tile 1  |          ldmatrix, 16 bytes of depth at a time twice
//     products                         |  tile 0  |  tile 1  |          mma.sync into the sums of each warp
//
// Loaders (loaders.h) say where tiles come from, the caller what becomes of the sums. Per step a block does
// 2 M N k FLOP on (M + N) k elements that it reads from memory, and a warp reads (WM + WN) k elements of shared memory
// for 2 WM WN k FLOP. The order of additions follows from the shape alone.
#pragma once

#include <cstdint>
#include <type_traits>

#include "loaders.h"
#include "tile.h"

namespace peft_kernels {

template <typename Element_, int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kStages_>
struct BlockShape {
  using Element = Element_;
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kStages = kStages_;
  static constexpr int kThreads = kLanes * kWarpsM * kWarpsN;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kMmaM = kWarpM / 16, kMmaN = kWarpN / 8;  // products of a warp
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
};

// What one lane holds of the sums, [row of products][column of products][4].
template <typename Shape>
struct Sums {
  float values[Shape::kMmaM][Shape::kMmaN][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& row : values) {
#pragma unroll
      for (auto& product : row) {
#pragma unroll
        for (float& value : product) value = 0.0f;
      }
    }
  }

  // visit(row, column, first, second) for each pair of neighbors, places counted within the block.
  template <typename Visit>
  __device__ __forceinline__ void for_each_pair(int thread, const Visit& visit) {
    const int warp = thread / kLanes, lane = thread % kLanes;
    const int row = warp / Shape::kWarpsN * Shape::kWarpM + lane / 4;
    const int column = warp % Shape::kWarpsN * Shape::kWarpN + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < Shape::kMmaM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < Shape::kMmaN; ++j) {
          float (&product)[4] = values[i][j];
          visit(row + i * 16 + half * 8, column + j * 8, product[half * 2], product[half * 2 + 1]);
        }
      }
    }
  }
};

// Float goes through tf32 as two terms, value = big + small, and three of their four products: small small, below
// 2^-22 of the product, is left out. What is not finite stays so: infinity leaves NaN as its rest.
template <typename Element>
constexpr int kTerms = sizeof(Element) == 4 ? 2 : 1;

__device__ __forceinline__ void split(uint32_t (&big)[4], uint32_t (&small)[4]) {
  constexpr uint32_t kHalf = 0x1000u, kTf32Bits = 0xFFFFE000u;  // half of the last bit that tf32 has, and all it has
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float value = __uint_as_float(big[i]);
    big[i] = (big[i] + kHalf) & kTf32Bits;
    small[i] = __float_as_uint(value - __uint_as_float(big[i])) & kTf32Bits;
  }
}

template <typename Element>
__device__ __forceinline__ void multiply_fragments(
    float (&sums)[4], const uint32_t (&left)[kTerms<Element>][4], const uint32_t (&right)[kTerms<Element>][2][2],
    int j) {
  if constexpr (sizeof(Element) == 4) {
    // Tensor cores cut their sums off instead of rounding them. Over a long depth that would add up, so each step is
    // summed by itself.
    float fresh[4] = {};
    multiply_tf32(fresh, left[1], right[0][j]);
    multiply_tf32(fresh, left[0], right[1][j]);
    multiply_tf32(fresh, left[0], right[0][j]);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += fresh[i];
  } else if constexpr (std::is_same_v<Element, BFloat16>) {
    multiply_bf16(sums, left[0], right[0][j]);
  } else {
    multiply_f16(sums, left[0], right[0][j]);
  }
}

// sums += left right over the depth of one pair of tiles.
template <typename Shape, typename LeftTile, typename RightTile>
__device__ __forceinline__ void multiply_tiles(
    const typename Shape::Element* left_tile, const typename Shape::Element* right_tile, int thread,
    Sums<Shape>& sums) {
  using Element = typename Shape::Element;
  // Fragments loaded ahead hide the latency of shared memory and cost registers: as far as no architecture spills.
  constexpr int kUnroll = kTerms<Element> == 2 ? 1 : Shape::kMmaM * Shape::kMmaN > 8 ? 4 : Shape::kMmaM > 1 ? 1 : 2;
  const int warp = thread / kLanes, lane = thread % kLanes;
  const int row = warp / Shape::kWarpsN * Shape::kWarpM, column = warp % Shape::kWarpsN * Shape::kWarpN;
#pragma unroll(kUnroll)
  for (int k = 0; k < LeftTile::kDepth; k += LeftTile::kMmaDepth) {
    uint32_t left[Shape::kMmaM][kTerms<Element>][4];
    uint32_t right[Shape::kMmaN / 2][kTerms<Element>][2][2];
#pragma unroll
    for (int i = 0; i < Shape::kMmaM; ++i) {
      LeftTile::left_fragment(left_tile, row + i * 16, k, lane, left[i][0]);
      if constexpr (kTerms<Element> == 2) split(left[i][0], left[i][1]);
    }
#pragma unroll
    for (int j = 0; j < Shape::kMmaN / 2; ++j) {
      uint32_t pair[4], rest[4];
      RightTile::right_fragments(right_tile, column + j * 16, k, lane, pair);
      if constexpr (kTerms<Element> == 2) split(pair, rest);
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        right[j][0][word / 2][word % 2] = pair[word];
        if constexpr (kTerms<Element> == 2) right[j][1][word / 2][word % 2] = rest[word];
      }
    }
#pragma unroll
    for (int i = 0; i < Shape::kMmaM; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::kMmaN; ++j) {
        multiply_fragments<Element>(sums.values[i][j], left[i], right[j / 2], j % 2);
      }
    }
  }
}

// The pipeline over `steps` tiles of depth. Between start() and run() the memory of the last stage is free.
template <typename Shape, typename LeftTile, typename RightTile, typename LeftLoader, typename RightLoader>
class MainLoop {
  using Element = typename Shape::Element;

 public:
  static constexpr int kStageBytes = LeftTile::kBytes + RightTile::kBytes;
  static constexpr int kSharedBytes = Shape::kStages * kStageBytes;

  __device__ __forceinline__ MainLoop(LeftLoader& left, RightLoader& right, int steps, unsigned char* shared)
      : left_(left), right_(right), steps_(steps), shared_(shared) {}

  // Brings the first tiles under way.
  __device__ __forceinline__ void start() {
#pragma unroll 1
    for (int stage = 0; stage < Shape::kStages - 1; ++stage) {
      if (stage < steps_) {
        left_.issue(left_tile(stage), stage);
        right_.issue(right_tile(stage), stage);
        left_.settle(left_tile(stage));
        right_.settle(right_tile(stage));
      }
      commit_copies();
    }
  }

  __device__ __forceinline__ void run(int thread, Sums<Shape>& sums) {
    int stage = 0, last = Shape::kStages - 1;  // of this step, and of the one kStages - 1 ahead
    for (int step = 0; step < steps_; ++step) {
      wait_copies<Shape::kStages - 2>();
      const int settling = step + Shape::kStages - 2;  // issued in the step before
      if (step > 0 && settling < steps_) {
        const int target = last == 0 ? Shape::kStages - 1 : last - 1;
        left_.settle(left_tile(target));
        right_.settle(right_tile(target));
      }
      left_.arrived(left_tile(stage), step);
      right_.arrived(right_tile(stage), step);
      __syncthreads();  // this step's tiles are whole, and all warps are done with those of the step before
      const int next = step + Shape::kStages - 1;
      if (next < steps_) {
        left_.issue(left_tile(last), next);
        right_.issue(right_tile(last), next);
      }
      commit_copies();
      multiply_tiles<Shape, LeftTile, RightTile>(left_tile(stage), right_tile(stage), thread, sums);
      stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
      last = last + 1 == Shape::kStages ? 0 : last + 1;
    }
    wait_copies<0>();
  }

 private:
  __device__ __forceinline__ Element* left_tile(int stage) const {
    return reinterpret_cast<Element*>(shared_ + stage * kStageBytes);
  }
  __device__ __forceinline__ Element* right_tile(int stage) const {
    return reinterpret_cast<Element*>(shared_ + stage * kStageBytes + LeftTile::kBytes);
  }

  LeftLoader& left_;
  RightLoader& right_;
  const int steps_;
  unsigned char* const shared_;
};

}  // namespace peft_kernels
