"""Slices of channels (S2FT) in plain PyTorch: the definition of each operator of the family.

Of a frozen `weight [N, K]` some channels train: those at `indices [s]` (int64, sorted, unique) of the K columns
(dim 1, a linear layer's input) or of the N rows (dim 0, its output). `trainable` holds the slice itself,
`weight[:, indices] [N, s]` or `weight[indices, :] [s, K]`, and is written into weight whenever it changes. So forward
and dx are those of the frozen layer,

    forward   y          = x weight^T + bias
    backward  dx         = dy weight
              dtrainable = dy^T x[:, indices]      at dim 1, which needs s columns of x only
                         = dy[:, indices]^T x      at dim 0

The layer behind an activation may take its columns of x from there: `h = silu(gate) * up` and `h[:, indices]`.

Source: Yang et al., "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity", NeurIPS
2024, section 3; `silu(gate) * up`: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from .lora import accumulation_dtype, as_rows
from .sparse_delta import sparse_adamw_


def gather_columns(x: Tensor, indices: Tensor) -> Tensor:
    """`x[:, indices]`: x `[M, K]`, result `[M, s]` in x's dtype, contiguous and in memory of its own."""
    return x.index_select(1, indices).contiguous()


def slice_grad(grad_out: Tensor, x: Tensor, indices: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`dy[:, indices]^T x`: dy `[M, A]`, x `[M, B]`, result `[s, B]` in `dtype`, summed in the accumulation dtype.

    Without indices all columns of dy are taken, for a result of `[A, B]`.
    """
    accumulate = accumulation_dtype(x.dtype)
    rows = grad_out if indices is None else grad_out.index_select(1, indices)
    return (rows.to(accumulate).t() @ x.to(accumulate)).to(dtype)


def slice_write_(weight: Tensor, indices: Tensor, values: Tensor, dim: int) -> None:
    """`weight[:, indices] = values [N, s]` at dim 1, `weight[indices, :] = values [s, K]` at dim 0.

    weight `[N, K]` is contiguous; values of any floating dtype are rounded to weight's, those of the same dtype are
    copied bit for bit.
    """
    weight.index_copy_(dim, indices, values.to(weight.dtype))


def slice_exchange_(
    weight: Tensor,
    held_indices: Tensor | None,
    held: Tensor | None,
    indices: Tensor,
    change: Tensor,
    original: Tensor,
    dim: int,
) -> None:
    """One slice for another: `weight[held_indices] = held`, `original = weight[indices]`, `weight[indices] += change`.

    weight `[N, K]` is contiguous. held, where given, and original are in weight's dtype and copied bit for bit; change
    is of any floating dtype. The sum is formed in the widest of the dtypes and float32, and rounded to weight's.
    Channels as in `slice_write_`, the two lists of them in common or not.
    """
    if (held is None) != (held_indices is None):
        missing, given = ("held", "held_indices") if held is None else ("held_indices", "held")
        raise ValueError(f"slice_exchange_: {missing} must be given with {given}, got None")
    if held is not None and held_indices is not None:
        weight.index_copy_(dim, held_indices, held)
    original.copy_(weight.index_select(dim, indices))
    wide = torch.promote_types(torch.promote_types(weight.dtype, change.dtype), torch.float32)
    slice_write_(weight, indices, original.to(wide) + change.to(wide), dim)


def slice_adamw_(
    trainable: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor | None,
    indices: Tensor | None,
    dim: int,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW on `trainable`, as `torch.optim.AdamW` does it, then `slice_write_` into `weight`.

    trainable `[N, s]` at dim 1, `[s, K]` at dim 0; grad and the moments likewise, in trainable's dtype, all contiguous;
    `step` counts from 1. Without weight (then without indices) nothing is written back.
    """
    if (weight is None) != (indices is None):
        missing, given = ("indices", "weight") if indices is None else ("weight", "indices")
        raise ValueError(f"slice_adamw_: {missing} must be given with {given}, got None")
    numbers = (step, lr, beta1, beta2, eps, weight_decay)
    sparse_adamw_(trainable, grad, exp_avg, exp_avg_sq, None, None, None, *numbers)
    if weight is not None and indices is not None:
        slice_write_(weight, indices, trainable, dim)


def swiglu(gate: Tensor, up: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """`h = silu(gate) * up` and `h[:, indices]`: gate and up `[M, K]`, results `[M, K]` and `[M, s]` in their dtype.

    h is formed in the accumulation dtype and rounded once.
    """
    accumulate = accumulation_dtype(gate.dtype)
    h = (silu(gate.to(accumulate)) * up.to(accumulate)).to(gate.dtype).contiguous()
    return h, gather_columns(h, indices)


def swiglu_backward(grad_h: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`(dgate, dup)`, both `[M, K]` in gate's dtype, formed in the accumulation dtype and rounded once.

    With `s = sigmoid(gate)`: `dgate = dh up s (1 + gate (1 - s))` and `dup = dh gate s`.
    """
    accumulate = accumulation_dtype(gate.dtype)
    dh, wide_gate, wide_up = (tensor.to(accumulate) for tensor in (grad_h, gate, up))
    sigmoid = wide_gate.sigmoid()
    grad_gate = dh * wide_up * (sigmoid * (1 + wide_gate * (1 - sigmoid)))
    grad_up = dh * (wide_gate * sigmoid)
    return grad_gate.to(gate.dtype).contiguous(), grad_up.to(gate.dtype).contiguous()


def s2ft_linear(x: Tensor, weight: Tensor, bias: Tensor | None, trainable: Tensor, indices: Tensor, dim: int) -> Tensor:
    """The whole layer as autograd sees it; differentiable any number of times. x `[..., K]`, result `[..., N]`.

    weight `[N, K]` holds trainable already; what is added here is zero, and carries the derivative to trainable.
    """
    change = (trainable - trainable.detach()).to(weight.dtype)
    live = weight + torch.zeros_like(weight).index_add(dim, indices, change)
    y = as_rows(x) @ live.t()
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], weight.shape[0])
