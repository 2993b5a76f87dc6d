"""S2FT layers to test with, and what they should compute: the dense layer, of whose gradient the slice is taken.

Letters as everywhere: x `[..., K]`, weight `[N, K]`, trainable `[N, s]` (dim "input") or `[s, K]` (dim "output"); both
transposed where the layer is a Conv1D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from peft_kernels import ops

from .s2ft import random_channels

LAYER_OPERATORS = ("gather_columns", "slice_grad", "slice_write_")
"""What the layer calls; a backend serves it when it serves all of them."""
TENSORS = ("x", "weight", "bias", "trainable")
DIMS = ("input", "output")
KINDS = (*DIMS, "input of Conv1D", "output of Conv1D")
"""A dim, of an nn.Linear unless it says otherwise."""


def parted(kind: str) -> tuple[str, bool]:
    """The dim that a kind names, and whether weight is `[K, N]`."""
    dim, _, layer = kind.partition(" of ")
    return dim, layer == "Conv1D"


@dataclass(frozen=True)
class S2FTLayer:
    """The arguments of one `s2ft_linear` call; weight holds trainable."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    trainable: Tensor
    indices: Tensor
    dim: str
    transposed: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Argument name to floating point tensor, without an absent bias."""
        return {name: tensor for name in TENSORS if (tensor := getattr(self, name)) is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> S2FTLayer:
        """The layer with `function` applied to every floating point tensor."""
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})

    def training(self, *names: str) -> S2FTLayer:
        """Fresh leaves in the same strides; those named require gradients."""
        return replace(
            self, **{name: tensor.detach().requires_grad_(name in names) for name, tensor in self.tensors().items()}
        )

    def along(self) -> int:
        """The dimension of weight that channels are counted along."""
        return int((self.dim == "input") != self.transposed)

    def oriented(self, part: Tensor) -> Tensor:
        """A part of weight as it lies in `[N, K]`."""
        return part.t() if self.transposed else part

    def call(self, function: Callable[..., Tensor], **options: Any) -> Tensor:
        """`function` of these arguments."""
        options = {"transposed": True, **options} if self.transposed else options
        return function(self.x, self.weight, self.bias, self.trainable, self.indices, self.dim, **options)

    def __call__(self, **options: Any) -> Tensor:
        """`peft_kernels.ops.s2ft_linear` of these arguments."""
        return self.call(ops.s2ft_linear, **options)


def random_s2ft_layer(
    kind: str = "input",
    leading: Iterable[int] = (7,),
    in_features: int = 24,
    out_features: int = 20,
    count: int = 5,
    dtype: torch.dtype = torch.float32,
    trainable_dtype: torch.dtype | None = None,
    bias: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> S2FTLayer:
    """A layer of normal numbers whose weight holds trainable, rounded."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / max(fan_in, 1) ** 0.5

    dim, transposed = parted(kind)
    along = 1 if dim == "input" else 0
    weight = normal(out_features, in_features, fan_in=in_features)
    indices = random_channels(weight.shape[along], count, generator)
    trainable_dtype = trainable_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    trainable = weight.index_select(along, indices).to(trainable_dtype)
    if transposed:
        along, weight, trainable = 1 - along, weight.t().contiguous(), trainable.t().contiguous()
    return S2FTLayer(
        x=normal(*leading, in_features).to(dtype).to(device),
        weight=weight.to(dtype).index_copy(along, indices, trainable.to(dtype)).to(device),
        bias=normal(out_features).to(dtype).to(device) if bias else None,
        trainable=trainable.to(device),
        indices=indices.to(device),
        dim=dim,
        transposed=transposed,
    )


def dense_results(layer: S2FTLayer, grad_out: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """y and all gradients of the dense layer in `dtype`, in PyTorch's own words; that of trainable is a slice."""
    dense = layer.map(lambda tensor: tensor.detach().to(dtype)).training(*TENSORS)
    y = linear(dense.x, dense.oriented(dense.weight), dense.bias)
    wanted = {name: tensor for name, tensor in dense.tensors().items() if name != "trainable"}
    found = dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad_out.to(dtype)), strict=True))
    return {"y": y.detach(), **found, "trainable": found["weight"].index_select(layer.along(), layer.indices)}


def results(layer: S2FTLayer, grad_out: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """y and the gradients of all tensors of `layer` that require one."""
    y = layer(**options)
    wanted = {name: tensor for name, tensor in layer.tensors().items() if tensor.requires_grad}
    found = torch.autograd.grad(y, list(wanted.values()), torch.ones_like(y) if grad_out is None else grad_out)
    return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}
