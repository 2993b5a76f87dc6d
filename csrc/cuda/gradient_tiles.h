// Tiles of the gradient of a weight, grad_out [M, N]^T x [M, K], for kernels that keep few of its entries: summed over
// the tokens on the main loop, then staged in shared memory.
#pragma once

#include <cstdint>

#include "main_loop.h"

namespace peft_kernels {

// 64 tokens of 16 bits a step, 32 of float: 128 rows of 128 bytes either way.
template <typename Shape_>
struct GradientTiles {
  using Shape = Shape_;
  using Element = typename Shape::Element;
  static constexpr int kTokens = 128 / sizeof(Element);
  using Left = Tile<Element, Along::outer, Shape::kM, kTokens>;
  using Right = Tile<Element, Along::outer, Shape::kN, kTokens>;
  using LeftLoader = AsyncLoader<Left, Shape::kThreads>;
  using RightLoader = AsyncLoader<Right, Shape::kThreads>;
  using Loop = MainLoop<Shape, Left, Right, LeftLoader, RightLoader>;
  // The blocks at once on a multiprocessor that the compiler is told of: without, it spills to have more small ones.
  // Two large ones it finds room for by itself, and spills when told.
  static constexpr int kBlocks = Shape::kThreads == 128 ? 4 : 0;
  static_assert(Shape::kM * Shape::kN * sizeof(float) <= Loop::kSharedBytes);  // where the result is staged
};

// Float takes the small tile always: its sums and both terms of its fragments would not fit the registers of a large
// one.
template <typename Element>
using LargeTile = BlockShape<Element, 128, 128, 2, 4, 3>;
template <typename Element>
using SmallTile = BlockShape<Element, 64, 64, 2, 2, 3>;

// Calls `function` with a value of the shape for a gradient [rows, columns]: the large one where enough of them fill a
// GPU.
template <typename Function>
void with_tile_shape(DType dtype, int64_t rows, int64_t columns, const Function& function) {
  constexpr int64_t kLeastTiles = 96;
  const bool large = ((rows + 127) / 128) * ((columns + 127) / 128) >= kLeastTiles;
  switch (dtype) {
    case DType::float32:
      return function(SmallTile<float>());
    case DType::bfloat16:
      return large ? function(LargeTile<BFloat16>()) : function(SmallTile<BFloat16>());
    case DType::float16:
      return large ? function(LargeTile<Half>()) : function(SmallTile<Half>());
  }
}

}  // namespace peft_kernels
