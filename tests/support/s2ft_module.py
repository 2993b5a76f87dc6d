"""`S2FTLinear` modules to test with, and the dense layer that they must be equal to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.nn import S2FTLinear

COUNT = 5
"""How many channels of a `random_s2ft_module` train, along either dimension."""


def random_s2ft_module(
    dim: Any = "input",
    dtype: torch.dtype = torch.float32,
    in_features: int = 24,
    out_features: int = 20,
    num_channels: int = COUNT,
    seed: int = 0,
    **options: Any,
) -> tuple[S2FTLinear, Tensor]:
    """An `S2FTLinear` whose slice has been trained, and a copy of its weight from before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = S2FTLinear(in_features, out_features, num_channels=num_channels, dim=dim, dtype=dtype, **options)
        original = layer.weight.detach().clone()
        with torch.no_grad():
            layer.trainable.add_(torch.randn(layer.trainable.shape, dtype=torch.float64) * 0.3)
    return layer, original


def weight_with_slice(layer: S2FTLinear, original: Tensor) -> Tensor:
    """What the layer's weight must hold: `original` with trainable in it, rounded once."""
    trainable = layer.trainable.detach().to(original.dtype)
    return original.index_copy(layer.axis, layer.indices, trainable)


def slice_of(layer: S2FTLinear, weight: Tensor) -> Tensor:
    """The channels of a dense weight, or of anything shaped like it, that this layer trains."""
    return weight.detach().index_select(layer.axis, layer.indices)


class MaskedDense(nn.Module):
    """`x W^T + bias`, where a dense W trains by a gradient that is zero outside of a layer's slice.

    W is kept in the slice's dtype, float32 over bfloat16, and rounded to x's dtype where it is used. The optimizer has
    to leave what it gives no gradient alone, so `pin` puts everything outside of the slice back: weight decay acts on
    all of a dense parameter.
    """

    def __init__(self, layer: S2FTLinear) -> None:
        super().__init__()
        layer.write()
        wide = layer.weight.detach().to(layer.trainable.dtype)
        self.weight = nn.Parameter(wide.index_copy(layer.axis, layer.indices, layer.trainable.detach()))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        mask = torch.zeros(wide.shape, dtype=torch.bool).index_fill(layer.axis, layer.indices, True)
        self.register_buffer("mask", mask)
        self.register_buffer("frozen", self.weight.detach().clone())
        self.weight.register_hook(lambda gradient: gradient * mask)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

    @torch.no_grad()
    def pin(self) -> None:
        """Undoes what an optimizer did outside of the slice."""
        self.weight.copy_(torch.where(self.mask, self.weight, self.frozen))
