"""Sparse deltas in plain PyTorch: the definition of each operator of the family.

A sparse delta changes few entries of a frozen `weight [N, K]`: those at `indices [nnz]`, sorted, unique, flat positions
`n K + k` (int32 or int64), by `values [nnz]`. The weight stays merged: it holds `original + values` there, written
absolutely, where `original [nnz]` is what it held before. So forward and dx are those of the frozen layer,

    forward   y       = x weight^T + bias
    backward  dx      = dy weight
              dvalues = (dy^T x)[indices]

and taking the delta away writes `original` back, bit for bit.

Source: Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models", 2024, section 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .lora import accumulation_dtype, as_rows


def _positions(indices: Tensor) -> Tensor:
    return indices.to(torch.int64)


def scatter_write_(weight: Tensor, indices: Tensor, original: Tensor, values: Tensor | None) -> None:
    """`weight[indices] = original + values`, rounded once; without values `original` itself, bit for bit.

    weight is contiguous, any shape; original `[nnz]` has its dtype, values `[nnz]` any floating one. The sum is formed
    in the wider of values' dtype and the accumulation dtype.
    """
    written = original
    if values is not None:
        dtype = torch.promote_types(accumulation_dtype(weight.dtype), values.dtype)
        written = (original.to(dtype) + values.to(dtype)).to(weight.dtype)
    weight.view(-1)[_positions(indices)] = written


def scatter_accumulate_(weight: Tensor, indices: Tensor, values: Tensor, scaling: float) -> None:
    """`weight[indices] += scaling values`, rounded once: a delta added to a checkpoint, or subtracted with -1."""
    dtype = torch.promote_types(accumulation_dtype(weight.dtype), values.dtype)
    flat, positions = weight.view(-1), _positions(indices)
    flat[positions] = (flat[positions].to(dtype) + scaling * values.to(dtype)).to(weight.dtype)


def sampled_product(grad_out: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """`(dy^T x)[indices]`: dy `[M, N]`, x `[M, K]`, result `[nnz]` in `dtype`, summed in the accumulation dtype."""
    accumulate = accumulation_dtype(x.dtype)
    product = grad_out.to(accumulate).t() @ x.to(accumulate)
    return product.flatten()[_positions(indices)].to(dtype)


def sparse_adamw_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor | None,
    indices: Tensor | None,
    original: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW on `values [nnz]`, as `torch.optim.AdamW` does it, then `scatter_write_` into `weight`.

    grad `[nnz]` in values' dtype, the moments `[nnz]` in values' dtype, all contiguous; `step` counts from 1. Without
    weight (then without indices and original) nothing is written back.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2.
    """
    values.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    values.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    if weight is not None:
        if indices is None or original is None:
            raise ValueError("sparse_adamw_: indices and original must be given with weight, got None")
        scatter_write_(weight, indices, original, values)


def sparse_delta_linear(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor) -> Tensor:
    """The whole layer as autograd sees it; differentiable any number of times. x `[..., K]`, result `[..., N]`.

    weight `[N, K]` holds the delta already; what is added here is zero, and carries the derivative to values.
    """
    change = (values - values.detach()).to(weight.dtype)
    zeros = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
    live = weight + zeros.index_put((_positions(indices),), change).view(weight.shape)
    y = as_rows(x) @ live.t()
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], weight.shape[0])


def sparse_sm3_(
    values: Tensor,
    grad: Tensor,
    row_max: Tensor,
    column_max: Tensor,
    exp_avg: Tensor | None,
    weight: Tensor | None,
    indices: Tensor,
    original: Tensor | None,
    lr: float,
    beta: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of SM3 on `values [nnz]`, then `scatter_write_` into `weight`.

    An entry's second moment is the smaller of two maxima, of its row and of its column, and its own square on top:

        u = min(row_max[n], column_max[k]) + g^2        all from the old maxima
        row_max[n] = max(row_max[n], u in this row)     column_max[k] likewise
        step = g / (sqrt(u) + eps)                      0 where u is 0
        values = values (1 - lr weight_decay) - lr step

    With `exp_avg`, `exp_avg = beta exp_avg + (1 - beta) step` takes the place of the step. grad and exp_avg `[nnz]`,
    row_max `[N]` and column_max `[K]`, at least 0, in values' dtype, all contiguous; every number is formed in the
    accumulation dtype and rounded once. Without weight (then without original) nothing is written back.

    Source: Anil et al., "Memory-Efficient Adaptive Optimization", NeurIPS 2019, SM3-II; the cover is rows and columns.
    """
    if (weight is None) != (original is None):
        missing, given = ("original", "weight") if original is None else ("weight", "original")
        raise ValueError(f"sparse_sm3_: {missing} must be given with {given}, got None")
    dtype, positions = accumulation_dtype(values.dtype), _positions(indices)
    columns = max(column_max.numel(), 1)
    row, column = positions // columns, positions % columns
    g = grad.to(dtype)
    second = torch.minimum(row_max[row], column_max[column]).to(dtype) + g * g
    rounded = second.to(values.dtype)
    row_max.scatter_reduce_(0, row, rounded, "amax")
    column_max.scatter_reduce_(0, column, rounded, "amax")
    update = torch.where(second == 0, 0.0, g / (second.sqrt() + eps))
    if exp_avg is not None:
        update = beta * exp_avg.to(dtype) + (1 - beta) * update
        exp_avg.copy_(update)
    values.copy_(values.to(dtype) * (1 - lr * weight_decay) - lr * update)
    if weight is not None:
        assert original is not None
        scatter_write_(weight, indices, original, values)
