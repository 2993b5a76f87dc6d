"""PaCA in plain PyTorch, from its formulas, to compare with: `y = x W^T + bias`, where a slice of W trains.

    input channels:   W[:, indices] = partial [N, s],   d partial = dy^T x[:, indices]
    output channels:  W[indices, :] = partial [s, K],   d partial = dy[:, indices]^T x

Source: Woo et al., "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", ICLR 2025, for input channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.linear import is_transposed


class PlainPaCALinear(nn.Module):
    """A linear layer that trains channels of its weight, which is written in every forward pass.

    Args:
        linear: an `nn.Linear` or a `Conv1D`, gives its weight and bias, which become frozen; the weight belongs to the
            new layer.
        indices: `[s]` int64, the channels.
        dim: "input" or "output".
        dtype: of what trains.
    """

    def __init__(self, linear: nn.Module, indices: Tensor, dim: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        if is_transposed(linear):
            self.weight = nn.Parameter(linear.weight.detach().t(), requires_grad=False)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.axis = 1 if dim == "input" else 0
        self.register_buffer("indices", indices, persistent=False)
        self.partial = nn.Parameter(self.weight.detach().index_select(self.axis, indices).to(dtype, copy=True))
        self.train(linear.training)

    indices: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., K]` to `[..., N]`."""
        y: Tensor = _PaCA.apply(x, self.weight, self.partial, self.indices, self.axis)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _PaCA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, partial: Tensor, indices: Tensor, axis: int) -> Tensor:
        # Through .data: passes may follow each other before a backward pass, and all write the same.
        weight.data.index_copy_(axis, indices, partial.detach().to(weight.dtype))
        ctx.axis, ctx.dtype = axis, partial.dtype
        ctx.save_for_backward(x.index_select(-1, indices) if axis == 1 else x, weight, indices)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        x, weight, indices = ctx.saved_tensors
        needs_x, _, needs_partial, *_ = ctx.needs_input_grad
        grad_x = grad_y @ weight if needs_x else None
        grad_partial = None
        if needs_partial:
            from_y = grad_y if ctx.axis == 1 else grad_y.index_select(-1, indices)
            product = from_y.reshape(-1, from_y.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
            grad_partial = product.to(ctx.dtype)
        return grad_x, None, grad_partial, None, None
