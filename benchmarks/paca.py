"""PaCA as its paper's formula says, in plain PyTorch: what our slices of input channels are compared with.

    forward   weight[:, indices] = trainable;  y = x weight^T;  x[:, indices] is kept
    backward  dx = dy weight;  dtrainable = dy^T x[:, indices]

Source: Woo et al., "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", ICLR 2025, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PaCAFunction(torch.autograd.Function):
    """x `[..., K]`, weight `[N, K]`, trainable `[N, s]` of any dtype, indices `[s]`; y `[..., N]`."""

    @staticmethod
    def forward(ctx, x, weight, trainable, indices):  # type: ignore[no-untyped-def, override]
        weight[:, indices] = trainable.to(weight.dtype)
        ctx.save_for_backward(x[..., indices], weight)
        ctx.dtype = trainable.dtype
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        x_slice, weight = ctx.saved_tensors
        grad = dy.flatten(0, -2).t() @ x_slice.flatten(0, -2)
        return dy @ weight, None, grad.to(ctx.dtype), None


class PaCALinear(nn.Module):
    """A linear layer without bias over the weight of `linear`, which it writes into; `trainable` is a parameter.

    Args:
        linear: the layer whose weight it takes.
        indices: `[s]` int64: the input channels that train.
        trainable: `[N, s]`, what they start from.
    """

    def __init__(self, linear: nn.Linear, indices: Tensor, trainable: Tensor) -> None:
        super().__init__()
        if linear.bias is not None:
            raise ValueError("PaCALinear takes layers without bias")
        self.weight = linear.weight.requires_grad_(False)
        self.register_buffer("indices", indices)
        self.trainable = nn.Parameter(trainable.clone())

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        return PaCAFunction.apply(x, self.weight.detach(), self.trainable, self.indices)  # type: ignore[no-any-return]
