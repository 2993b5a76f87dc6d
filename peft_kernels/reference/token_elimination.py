"""Token elimination in plain PyTorch: the definition of each operator that moves the rows of kept tokens.

A residual block is computed for some rows of `x [M, H]` alone, the others pass through:

    forward   y = x,  y[rows] += f(norm(x[rows]))
    backward  dx = dy,  dx[rows] += d(f norm)^T dy[rows]

`rows [S]` is int32. Entries that are not negative are rows, sorted and unique; a negative one stands for no row: where
rows are gathered it gives zeros, where they are scattered it is passed over. So a count that only the device knows is
filled up to a capacity that the host knows.

Source: Wang et al., "LeMo: Enabling Less Token Involvement for More Context Fine-tuning", 2025 (JENGA, USENIX ATC
2025); the norm: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019; the rotation: Su et al.,
"RoFormer", 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lora import accumulation_dtype


def _is_row(rows: Tensor) -> Tensor:
    return rows >= 0


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]`: x `[M, C]`, result `[S, C]` in x's dtype, contiguous and in memory of its own."""
    if x.shape[0] == 0:
        return x.new_zeros(rows.shape[0], x.shape[1])
    found = x.index_select(0, rows.clamp(min=0))
    return torch.where(_is_row(rows)[:, None], found, torch.zeros((), dtype=x.dtype, device=x.device)).contiguous()


def scatter_add_rows(residual: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """residual `[M, C]` with values `[S, C]` added at rows: a new tensor, contiguous, in residual's dtype.

    Sums are formed in the accumulation dtype and rounded once; other rows are copied bit for bit.
    """
    total, accumulate = residual.shape[0], accumulation_dtype(residual.dtype)
    places = torch.where(_is_row(rows), rows, total).long()  # what stands for no row goes to one behind the last
    extended = torch.cat((residual, residual.new_zeros(1, residual.shape[1])))
    sums = extended.index_select(0, places).to(accumulate) + values.to(accumulate)
    return extended.index_copy(0, places, sums.to(residual.dtype))[:total].contiguous()


def scatter_add_rows_(out: Tensor, values: Tensor, rows: Tensor) -> None:
    """`out[rows] += values` in place: as `scatter_add_rows`."""
    out.copy_(scatter_add_rows(out, values, rows))


def gather_rms_norm(
    x: Tensor, rows: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`h = kept rstd (offset + weight)` for `kept = x[rows]`, `rstd = 1 / sqrt(mean(kept^2) + eps)`.

    Args:
        x: `[M, H]`.
        rows: None takes all of x, and the second result is then `[0, H]`.
        weight: `[H]`, in any floating dtype.
        eps: in the root.
        offset: 1 for norms whose weight is the difference from one (Gemma), else 0.

    Returns:
        h `[S, H]` and kept `[S, H]` in x's dtype, rstd `[S]` in the accumulation dtype; h is rounded once.
    """
    accumulate = accumulation_dtype(x.dtype)
    kept = x if rows is None else gather_rows(x, rows)
    rstd = (kept.to(accumulate).square().mean(1) + eps).rsqrt()
    h = rms_norm_rows(kept, rstd, weight, offset)
    return h, x.new_empty(0, x.shape[1]) if rows is None else kept, rstd


def rms_norm_rows(kept: Tensor, rstd: Tensor, weight: Tensor, offset: float) -> Tensor:
    """`kept rstd (offset + weight)` again from what `gather_rms_norm` returned, to the bit."""
    accumulate = accumulation_dtype(kept.dtype)
    scaled = kept.to(accumulate) * rstd[:, None]
    return (scaled * (weight.to(accumulate) + offset)).to(kept.dtype).contiguous()


def gather_rms_norm_backward(
    grad_residual: Tensor | None,
    grad_h: Tensor,
    kept: Tensor,
    rstd: Tensor,
    weight: Tensor,
    offset: float,
    rows: Tensor | None,
    total: int,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `gather_rms_norm` by x and weight, the first one added to the residual's.

    With `g = grad_h (offset + weight)` and `n = kept rstd`: `dkept = rstd (g - n mean(g n))`, `dweight = sum of
    grad_h n over rows`.

    Args:
        grad_residual: `[M, H]`; None stands for zeros.
        grad_h: `[S, H]`.
        kept: `[S, H]`; x itself where rows is None.
        rstd: `[S]`.
        weight: `[H]`.
        offset: as in forward.
        rows: `[S]`, or None.
        total: M.
        weight_grad: whether the gradient by weight is wanted.

    Returns:
        dx `[M, H]` in kept's dtype, rounded once, a new tensor; dweight `[H]` in weight's dtype, `[0]` if not wanted.
    """
    accumulate = accumulation_dtype(kept.dtype)
    normalized = kept.to(accumulate) * rstd[:, None]
    dh = grad_h.to(accumulate)
    scaled = dh * (weight.to(accumulate) + offset)
    dkept = rstd[:, None] * (scaled - normalized * (scaled * normalized).mean(1, keepdim=True))
    if grad_residual is None:
        grad_residual = kept.new_zeros(total, kept.shape[1])
    if rows is None:
        dx = (grad_residual.to(accumulate) + dkept).to(kept.dtype)
    else:
        dx = scatter_add_rows(grad_residual, dkept, rows)
    if not weight_grad:
        return dx.contiguous(), weight.new_empty(0)
    if rows is not None:
        dh = dh * _is_row(rows)[:, None]
    return dx.contiguous(), (dh * normalized).sum(0).to(weight.dtype)


def rope_rows(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None, inverse: bool) -> Tensor:
    """Rotary embedding of the heads of some tokens, at the positions they have in the whole sequence.

    Args:
        x: `[S, heads, D]`.
        cos, sin: `[P, R]` with R even and at most D, in any floating dtype; channel c below R / 2 is rotated with
            c + R / 2, channels from R on stay.
        rows: `[S]`, which row of cos and sin each token takes, in any order; a negative one gives zeros. None takes row
            s for token s.
        inverse: turns back; the gradient of the rotation.

    Returns:
        `[S, heads, D]` in x's dtype, contiguous, rounded once.
    """
    accumulate = accumulation_dtype(x.dtype)
    if rows is not None:
        cos, sin = gather_rows(cos, rows), gather_rows(sin, rows)
    half = cos.shape[1] // 2
    cos, sin = cos.to(accumulate)[:, None], sin.to(accumulate)[:, None]
    turned = x[..., : 2 * half].to(accumulate)
    first, second = turned[..., :half], turned[..., half:]
    cos_first, cos_second, sin_first, sin_second = cos[..., :half], cos[..., half:], sin[..., :half], sin[..., half:]
    if inverse:
        rotated = (first * cos_first + second * sin_second, second * cos_second - first * sin_first)
    else:
        rotated = (first * cos_first - second * sin_first, second * cos_second + first * sin_second)
    rest = x[..., 2 * half :]
    if rows is not None:
        rest = torch.where(_is_row(rows)[:, None, None], rest, torch.zeros((), dtype=x.dtype, device=x.device))
    return torch.cat((*(part.to(x.dtype) for part in rotated), rest), -1).contiguous()


def gather_linear_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    residual: Tensor | None,
    gather: bool,
    transposed: bool,
) -> Tensor:
    """`residual` with `x[rows] weight^T + bias` added at rows.

    Args:
        x: `[M, K]` of which rows are gathered, or, without `gather`, `[S, K]`, gathered already.
        weight: `[N, K]`, or `[K, N]` when transposed, in x's dtype.
        bias: `[N]` in x's dtype, or None.
        rows: `[S]`.
        residual: `[M, N]` in x's dtype; None asks for the product alone, `[S, N]`.
        gather: whether x holds all rows.
        transposed: how weight lies.

    Returns:
        `[M, N]`, or `[S, N]` without residual, in x's dtype, a new tensor. The product may be rounded before it is
        added, where it is a library's.
    """
    inputs = gather_rows(x, rows) if gather else x
    y = inputs @ (weight if transposed else weight.t())
    if bias is not None:
        y = y + bias
    if residual is None:
        return torch.where(_is_row(rows)[:, None], y, torch.zeros((), dtype=y.dtype, device=y.device))
    return scatter_add_rows(residual, y, rows)


def gather_linear_scatter_(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, gather: bool, transposed: bool
) -> None:
    """`out[rows] += x[rows] weight^T + bias` in place: as `gather_linear_scatter` with out `[M, N]` for the residual.

    Out shares no memory with x, weight and bias.
    """
    out.copy_(gather_linear_scatter(x, weight, bias, rows, out, gather, transposed))
