// A tile of an operand in shared memory, laid out so that cp.async and ldmatrix meet no bank conflicts. (What goes
// element by element may meet them two to four by four: operands that are cast, and float fragments along outer.)
//
// An operand of a product is a matrix [outer, depth]: outer is a row or a column of the result, depth is summed over.
// In global memory neighboring elements lie along one of the two, and the tile keeps that: its rows are runs of
// neighbors. A row is cut into chunks of 16 bytes, the unit of cp.async and of ldmatrix, and the chunks of a row are
// permuted by the row's number: the eight chunks that one ldmatrix reads from eight rows then lie in different banks.
#pragma once

#include <cstdint>

#include <ptx/matrix.h>

namespace peft_kernels {

constexpr int kLanes = 32;
constexpr int kChunkBytes = 16;

enum class Along { depth, outer };

template <typename Element_, Along along_, int kOuter_, int kDepth_>
struct Tile {
  using Element = Element_;
  static constexpr Along along = along_;
  static constexpr int kOuter = kOuter_, kDepth = kDepth_;
  static constexpr int kChunk = kChunkBytes / sizeof(Element);  // elements
  static constexpr int kRows = along == Along::depth ? kOuter : kDepth;
  static constexpr int kColumns = along == Along::depth ? kDepth : kOuter;
  static constexpr int kChunks = kColumns / kChunk;  // per row
  static constexpr int kBytes = kRows * kColumns * static_cast<int>(sizeof(Element));
  static constexpr int kMmaDepth = 2 * kChunk;  // k of the matrix instruction on these elements
  static_assert((kChunks & (kChunks - 1)) == 0 && kColumns % kChunk == 0);

  // Where a chunk of a row starts, in elements. Eight chunks are all banks once.
  static __device__ __forceinline__ int chunk_offset(int row, int chunk) {
    constexpr int kMask = kChunks < 8 ? kChunks - 1 : 7, kRowsPerSweep = kChunks < 8 ? 8 / kChunks : 1;
    return row * kColumns + (chunk ^ (row / kRowsPerSweep & kMask)) * kChunk;
  }
  static __device__ __forceinline__ int offset(int outer, int depth) {
    const int row = along == Along::depth ? outer : depth, column = along == Along::depth ? depth : outer;
    return chunk_offset(row, column / kChunk) + column % kChunk;
  }

  // The left fragment of 16 outer by kMmaDepth elements from (outer, depth) on; the layout is in ptx/matrix.h.
  static __device__ __forceinline__ void left_fragment(
      const Element* tile, int outer, int depth, int lane, uint32_t (&fragment)[4]) {
    // Matrices 0 and 1 one below the other, 2 and 3 beside them.
    load_fragment(
        tile, lane, fragment, [=](int matrix) { return Place{outer + matrix % 2 * 8, depth + matrix / 2 * kChunk}; });
  }

  // The right fragments of two neighboring products, of 8 outer elements each: words 0 and 1, words 2 and 3.
  static __device__ __forceinline__ void right_fragments(
      const Element* tile, int outer, int depth, int lane, uint32_t (&fragments)[4]) {
    load_fragment(
        tile, lane, fragments, [=](int matrix) { return Place{outer + matrix / 2 * 8, depth + matrix % 2 * kChunk}; });
  }

 private:
  struct Place {
    int outer, depth;
  };

  // Four matrices of 8 outer elements by one chunk of depth, `corner(matrix)` their first elements.
  template <typename Corner>
  static __device__ __forceinline__ void load_fragment(
      const Element* tile, int lane, uint32_t (&words)[4], const Corner& corner) {
    if constexpr (along == Along::depth) {
      const Place place = corner(lane / 8);
      load_matrices(words, tile + offset(place.outer + lane % 8, place.depth));
    } else if constexpr (sizeof(Element) == 2) {
      const Place place = corner(lane / 8);
      load_matrices_transposed(words, tile + offset(place.outer, place.depth + lane % 8));
    } else {  // ldmatrix transposes 16-bit elements only
#pragma unroll
      for (int matrix = 0; matrix < 4; ++matrix) {
        const Place place = corner(matrix);
        words[matrix] = __float_as_uint(tile[offset(place.outer + lane / 4, place.depth + lane % 4)]);
      }
    }
  }
};

}  // namespace peft_kernels
