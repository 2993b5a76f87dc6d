"""`S2FTLinear` and `S2FTConv1D` modules to test with, and the dense layer that they must be equal to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.nn import S2FTConv1D, S2FTLinear

from .s2ft_layer import parted

COUNT = 5
"""How many channels of a `random_s2ft_module` train, along either dimension."""


class Conv1D(nn.Module):
    """What transformers' class of this name is known by."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.empty(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


def as_conv1d(linear: nn.Linear) -> Conv1D:
    """A `Conv1D` of the same numbers."""
    conv1d = Conv1D(linear.out_features, linear.in_features)
    conv1d.weight = nn.Parameter(linear.weight.detach().t().contiguous())
    conv1d.bias = nn.Parameter(torch.zeros(linear.out_features)) if linear.bias is None else linear.bias
    return conv1d


def plain_layer(
    transposed: bool, in_features: int = 24, out_features: int = 20, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """An `nn.Linear`, or a `Conv1D` of the same numbers."""
    linear = nn.Linear(in_features, out_features, dtype=dtype)
    return as_conv1d(linear) if transposed else linear


def drop_in(transposed: bool) -> Any:
    """The class of the drop-in for a `plain_layer`."""
    return S2FTConv1D if transposed else S2FTLinear


def random_s2ft_module(
    kind: str = "input",
    dtype: torch.dtype = torch.float32,
    in_features: int = 24,
    out_features: int = 20,
    num_channels: int = COUNT,
    seed: int = 0,
    **options: Any,
) -> tuple[Any, Tensor]:
    """An `S2FTLinear` or `S2FTConv1D` whose slice has been trained, and a copy of its weight from before."""
    dim: Any
    dim, transposed = parted(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer: Any
        if transposed:
            plain = plain_layer(True, in_features, out_features, dtype)
            if not options.pop("bias", True):
                plain.bias = None
            layer = S2FTConv1D.from_linear(plain, num_channels=num_channels, dim=dim, **options)
        else:
            layer = S2FTLinear(in_features, out_features, num_channels=num_channels, dim=dim, dtype=dtype, **options)
        original = layer.weight.detach().clone()
        with torch.no_grad():
            layer.trainable.add_(torch.randn(layer.trainable.shape, dtype=torch.float64) * 0.3)
    return layer, original


def weight_with_slice(layer: Any, original: Tensor) -> Tensor:
    """What the layer's weight must hold: `original` with trainable in it, rounded once."""
    trainable = layer.trainable.detach().to(original.dtype)
    return original.index_copy(layer.axis, layer.indices, trainable)


def slice_of(layer: Any, weight: Tensor) -> Tensor:
    """The channels of a dense weight, or of anything shaped like it, that this layer trains."""
    return weight.detach().index_select(layer.axis, layer.indices)


class MaskedDense(nn.Module):
    """`x W^T + bias`, where a dense W trains by a gradient that is zero outside of a layer's slice.

    W is kept in the slice's dtype, float32 over bfloat16, and rounded to x's dtype where it is used. The optimizer has
    to leave what it gives no gradient alone, so `pin` puts everything outside of the slice back: weight decay acts on
    all of a dense parameter.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.oriented = layer.oriented
        layer.write()
        wide = layer.weight.detach().to(layer.trainable.dtype)
        self.weight = nn.Parameter(wide.index_copy(layer.axis, layer.indices, layer.trainable.detach()))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        mask = torch.zeros(wide.shape, dtype=torch.bool).index_fill(layer.axis, layer.indices, True)
        self.register_buffer("mask", mask)
        self.register_buffer("frozen", self.weight.detach().clone())
        self.weight.register_hook(lambda gradient: gradient * mask)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.oriented(self.weight.to(x.dtype)), self.bias)

    @torch.no_grad()
    def pin(self) -> None:
        """Undoes what an optimizer did outside of the slice."""
        self.weight.copy_(torch.where(self.mask, self.weight, self.frozen))
