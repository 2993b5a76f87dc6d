"""Winner-take-all column-row sampling in plain PyTorch: the weight gradient of a linear layer from some of its rows.

With `x [M, K]` and `dy [M, N]` the gradient is a sum of M outer products, `dW = sum_i dy_i x_i^T`. For probabilities
`p_i`, here proportional to given norms, and a budget of k rows, C being the rows of the largest p:

    dW ~ sum over i in C of dy_i x_i^T
         + (1 - P_C) / (k - |C|) sum over the k - |C| rows j drawn from the others of dy_j x_j^T / p_j

with `P_C` the sum of p over C, and the |C| that minimizes `(1 - P_C) / (k - |C|)`. Each draw takes j with probability
`p_j / (1 - P_C)`, so that the expectation is dW itself.

Which |C| that is: with one row more the quotient falls as long as `(k - c) p_c > 1 - sum over i < c of p_i`, for p in
descending order and c counted from 0. Once that is false it stays so, as p only falls. In words: C holds the rows that
draws alone would take more than once.

The authors draw independently. Here draw s takes its row from the s-th of k - |C| equal parts of the others' total:
over all draws a row has the same expected count, and the variance is at most that of independent draws, because what
differs between the parts no longer adds to it (stratified sampling with proportional allocation).

Source: Liu et al., "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model", NeurIPS
2023, section 3.2; strata: Cochran, "Sampling Techniques", 1977, section 5.6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lora import accumulation_dtype

_UNITS = 2.0**31
"""Of the largest probability: the sum of fewer than 2^31 whole numbers up to this one fits into int64."""


def row_norms(x: Tensor) -> Tensor:
    """The Euclidean norm of each row: x `[M, K]`, result `[M]`.

    In the accumulation dtype, but in bfloat16 for bfloat16, which torch computes several times faster on CPUs: it has
    float32's range, and no choice of probabilities makes a gradient wrong.
    """
    dtype = x.dtype if x.dtype == torch.bfloat16 else accumulation_dtype(x.dtype)
    return torch.linalg.vector_norm(x, dim=1, dtype=dtype)


def sampled_rows(norms: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that stand for all, and the factor of each: `dW ~ sum over s of scales[s] dy[rows[s]] x[rows[s]]^T`.

    Probabilities are whole numbers, norms in units of 2^-31 of the largest, rounded up. Their sums are exact in any
    order, so the result has the same bits on every device, and a row of small norm is rare, but never impossible.

    Args:
        norms: `[M]`, floating; one that is not positive is that of a row without a gradient, which is never taken. With
            one that is not finite all scales are NaN.
        uniforms: `[k]`, float64, in [0, 1); the first |C| are not used.

    Returns:
        rows int32 and scales float32, both `[min(k, M)]`: first C with scale 1, then the drawn ones, by norm in
        descending order; a row may be drawn twice. Where k is at least M they are all rows, in order, with scale 1.
    """
    total, k = norms.shape[0], uniforms.shape[0]
    device = norms.device
    if k >= total:
        return torch.arange(total, dtype=torch.int32, device=device), torch.ones(total, device=device)
    shares = torch.nan_to_num(norms.double() / norms.double().amax(), posinf=0.0)
    weights, order = (shares * _UNITS).ceil().clamp(min=0.0).long().sort(descending=True, stable=True)
    ends = weights.cumsum(0)
    largest, slots = weights[:k], torch.arange(k, device=device)
    certain = (k - slots) * largest > ends[-1] - ends[:k] + largest  # holds for the first |C| slots and no other
    count = certain.sum()
    rest = ends[-1] - torch.where(certain, largest, 0).sum()
    draws = k - count  # one at least: of the last slot `certain` cannot hold
    point = ((slots - count + uniforms) * (rest.double() / draws)).long()
    point = torch.minimum(point, rest - 1).clamp(min=0) + (ends[-1] - rest)
    place = torch.searchsorted(ends, point, right=True).clamp(max=total - 1)
    place = torch.where(certain, slots, place)
    drawn = weights.index_select(0, place)
    scales = torch.where(certain, 1.0, rest.double() / (draws * drawn))
    scales = torch.where(drawn > 0, scales, 0.0) + (norms * 0.0).sum().double()
    return order.index_select(0, place).int(), scales.float()


def sampled_weight_grad(grad_out: Tensor, kept: Tensor, scales: Tensor) -> Tensor:
    """`(scales * grad_out)^T kept [N, K]`: rows that were sampled of dy `[k, N]` and of x `[k, K]`, scales `[k]`.

    The scaled rows are rounded to grad_out's dtype, in which the product takes them.
    """
    scaled = grad_out.to(accumulation_dtype(grad_out.dtype)) * scales[:, None]
    return scaled.to(grad_out.dtype).t() @ kept
