// hidden [M, r] = scale (D * x [M, C]) factor [r, C]^T. Bytes: x once, M C elements; the factor per block of 64 rows,
// from L2.
#include <cuda_runtime.h>

#include "skinny_product.h"

namespace peft_kernels {
namespace {

// A step is 128 bytes of each row.
template <typename Element, int kRank>
using Shrink = SkinnyProduct<Element, Along::depth, 64, kRank, 128 / sizeof(Element)>;

template <typename Element, int kRank>
__global__ void __launch_bounds__(kSkinnyThreads) shrink_kernel(const __grid_constant__ SkinnyArguments a) {
  multiply_skinny<Shrink<Element, kRank>>(a);
}

}  // namespace

void start_shrink(
    const char* operation, const Tensor& out, const Tensor& x, const Tensor& factor, double scaling,
    const Dropout& dropout) {
  if (out.numel() == 0) return;
  with_element_type(dtype_of(x.scalar_type()), [&](auto element) {
    with_rank_block(factor.size(0), [&](auto rank) {
      using Element = decltype(element);
      start_skinny<Shrink<Element, rank>>(
          operation, shrink_kernel<Element, rank>, out, false, {"x", x, 0}, {"factor", factor, 0}, scaling, dropout);
    });
  });
}

}  // namespace peft_kernels
