"""LoRA in plain PyTorch: the definition of each operator of the family.

With `x [M, K]`, `weight [N, K]`, `lora_a [r, K]`, `lora_b [N, r]`, scaling `s` and `D = dropout mask / (1 - p)`:

    forward   hidden      = (D * x) lora_a^T                             [M, r]
              y           = x weight^T + bias + s hidden lora_b^T        [M, N]
    backward  grad_hidden = s dy lora_b                                  [M, r]
              grad_b      = s dy^T hidden                                [N, r]
              grad_a      = grad_hidden^T (D * x)                        [r, K]
              dx          = dy weight + D * (grad_hidden lora_a)         [M, K]

`hidden` and `grad_hidden` are kept in the accumulation dtype: float64 for float64 activations, float32 otherwise.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, eq. 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import dropout_mask, dropout_scale


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are formed in: float64 for float64, float32 for float32, bfloat16 and float16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_rows(x: Tensor) -> Tensor:
    """x `[..., C]` as a matrix `[M, C]`; any size may be zero, which `reshape(-1, C)` does not allow for C."""
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def dropped(x: Tensor, dropout_p: float, rng_state: Tensor | None) -> Tensor:
    """`D * x` for a 2-D `x`; `x` itself when there is no dropout."""
    if dropout_p == 0.0:
        return x
    if rng_state is None:
        raise ValueError(f"rng_state is needed when dropout_p > 0, got None with dropout_p {dropout_p}")
    mask = dropout_mask(x.shape[0], x.shape[1], dropout_p, rng_state)
    return torch.where(mask, x * dropout_scale(dropout_p), torch.zeros((), dtype=x.dtype, device=x.device))


def lora_shrink(x: Tensor, factor: Tensor, scaling: float, dropout_p: float, rng_state: Tensor | None) -> Tensor:
    """`scaling (D * x) factor^T`: x `[M, C]`, factor `[r, C]`, result `[M, r]` in the accumulation dtype."""
    dtype = accumulation_dtype(x.dtype)
    return dropped(x.to(dtype), dropout_p, rng_state) @ factor.to(dtype).t() * scaling


def _low_rank(hidden: Tensor, factor: Tensor, scaling: float, dropout_p: float, rng_state: Tensor | None) -> Tensor:
    return dropped(hidden @ factor.to(hidden.dtype) * scaling, dropout_p, rng_state)


def lora_accumulate_(
    out: Tensor, hidden: Tensor, factor: Tensor, scaling: float, dropout_p: float, rng_state: Tensor | None
) -> None:
    """`out += D * (scaling hidden factor)` in place: out `[M, C]`, hidden `[M, r]`, factor `[r, C]`."""
    out.copy_(out + _low_rank(hidden, factor, scaling, dropout_p, rng_state))


def lora_matmul(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    factor: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> Tensor:
    """`x matrix + bias + D * (scaling hidden factor)`, the one shape of kernel behind forward and dx.

    x `[M, C_in]`, matrix `[C_in, C_out]`, bias `[C_out]`, hidden `[M, r]`, factor `[r, C_out]`; result `[M, C_out]`
    in x's dtype.
    """
    base = x @ matrix if bias is None else torch.addmm(bias, x, matrix)
    return (base + _low_rank(hidden, factor, scaling, dropout_p, rng_state)).to(x.dtype)


def lora_factor_grad(
    x: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
    dtype: torch.dtype,
    transposed: bool,
) -> Tensor:
    """`scaling hidden^T (D * x)`: x `[M, C]`, hidden `[M, r]`; result `[r, C]` in `dtype`, contiguous.

    `transposed` asks for the transpose `[C, r]`, the layout of `lora_b`.
    """
    activations = dropped(x.to(hidden.dtype), dropout_p, rng_state)
    grad = activations.t() @ hidden if transposed else hidden.t() @ activations
    return (grad * scaling).to(dtype)


def lora_grad_b(grad_out: Tensor, hidden: Tensor, lora_b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """`(s dy lora_b, s dy^T hidden)`, the two gradients that share a read of dy `[M, N]`; `[M, r]` and `[N, r]`."""
    grad_hidden = lora_shrink(grad_out, lora_b.t(), scaling, 0.0, None)
    return grad_hidden, lora_factor_grad(grad_out, hidden, scaling, 0.0, None, lora_b.dtype, True)


def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`y [M, N]` in x's dtype and the `hidden [M, r]` that backward asks for; the layer's forward in one call."""
    hidden = lora_shrink(x, lora_a, 1.0, dropout_p, rng_state)
    return lora_matmul(x, weight.t(), bias, hidden, lora_b.t(), scaling, 0.0, None), hidden


def lora_linear_backward(
    grad_out: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dx [M, K]`, `grad_a [r, K]` and `grad_b [N, r]`, those that are needed; the others are empty, of shape `[0]`.

    grad_out `[M, N]`; x may be None unless grad_a is needed. dx has grad_out's dtype, the others their factors'.
    """
    if x is None and need_a:
        raise ValueError("lora_linear_backward: x must be given for the gradient of lora_a, got None")
    dx, grad_a, grad_b = grad_out.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    grad_hidden = lora_shrink(grad_out, lora_b.t(), scaling, 0.0, None)
    if need_x:
        dx = lora_matmul(grad_out, weight, None, grad_hidden, lora_a, 1.0, dropout_p, rng_state)
    if x is not None and need_a:
        grad_a = lora_factor_grad(x, grad_hidden, 1.0, dropout_p, rng_state, lora_a.dtype, False)
    if need_b:
        grad_b = lora_factor_grad(grad_out, hidden, scaling, 0.0, None, lora_b.dtype, True)
    return dx, grad_a, grad_b


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
) -> Tensor:
    """The whole layer as autograd sees it; differentiable any number of times. x `[..., K]`, result `[..., N]`."""
    y, _ = lora_linear_forward(as_rows(x), weight, bias, lora_a, lora_b, scaling, dropout_p, rng_state)
    return y.reshape(*x.shape[:-1], weight.shape[0])
