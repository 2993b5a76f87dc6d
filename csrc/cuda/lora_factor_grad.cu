// grad [C, r] = scale (D * x [M, C])^T hidden [M, r], stored so or as its transpose: summed over the tokens. Bytes: x
// once, M C elements, 256 bytes of a row at a time; hidden per block of columns, from L2.
#include <cuda_runtime.h>

#include "skinny_product.h"

namespace peft_kernels {
namespace {

// A step is 32 tokens.
template <typename Element, int kRank>
using FactorGrad = SkinnyProduct<Element, Along::outer, 256 / sizeof(Element), kRank, 32>;

template <typename Element, int kRank>
__global__ void __launch_bounds__(kSkinnyThreads) factor_grad_kernel(const __grid_constant__ SkinnyArguments a) {
  multiply_skinny<FactorGrad<Element, kRank>>(a);
}

}  // namespace

void start_factor_grad(
    const char* operation, const Tensor& out, const Tensor& x, const Tensor& hidden, double scaling,
    const Dropout& dropout, bool transposed) {
  if (out.numel() == 0) return;
  with_element_type(dtype_of(x.scalar_type()), [&](auto element) {
    with_rank_block(hidden.size(1), [&](auto rank) {
      using Element = decltype(element);
      start_skinny<FactorGrad<Element, rank>>(  // [C, r] is the product as it is, [r, C] its transpose
          operation, factor_grad_kernel<Element, rank>, out, !transposed, {"x", x, 1}, {"hidden", hidden, 1}, scaling,
          dropout);
    });
  });
}

}  // namespace peft_kernels
