"""Sparse-delta layers to test with, and what they should compute: the dense layer, whose gradient is then gathered.

Letters as everywhere: x `[..., K]`, weight `[N, K]`, values and indices `[nnz]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from peft_kernels import ops
from peft_kernels.nn import SparseDeltaLinear

LAYER_OPERATORS = ("scatter_write_", "sampled_product")
"""What the layer calls; a backend serves it when it serves both."""
TENSORS = ("x", "weight", "bias", "values")


@dataclass(frozen=True)
class SparseLayer:
    """The arguments of one `sparse_delta_linear` call; weight holds the delta."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    values: Tensor
    indices: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Argument name to floating point tensor, without an absent bias."""
        return {name: tensor for name in TENSORS if (tensor := getattr(self, name)) is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> SparseLayer:
        """The layer with `function` applied to every floating point tensor."""
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})

    def training(self, *names: str) -> SparseLayer:
        """Fresh leaves in the same strides; those named require gradients."""
        return replace(
            self, **{name: tensor.detach().requires_grad_(name in names) for name, tensor in self.tensors().items()}
        )

    def __call__(self, **options: Any) -> Tensor:
        """`peft_kernels.ops.sparse_delta_linear` of these arguments."""
        return ops.sparse_delta_linear(self.x, self.weight, self.bias, self.values, self.indices, **options)


def random_sparse_layer(
    leading: Iterable[int] = (7,),
    in_features: int = 24,
    out_features: int = 20,
    count: int = 37,
    dtype: torch.dtype = torch.float32,
    values_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype = torch.int32,
    bias: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> SparseLayer:
    """A layer of normal numbers, with the delta in its weight."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / max(fan_in, 1) ** 0.5

    weight = normal(out_features, in_features, fan_in=in_features)
    indices = torch.randperm(weight.numel(), generator=generator)[:count].sort().values
    values = normal(count, fan_in=in_features)
    weight.view(-1)[indices] += values
    values_dtype = values_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    return SparseLayer(
        x=normal(*leading, in_features).to(dtype).to(device),
        weight=weight.to(dtype).to(device),
        bias=normal(out_features).to(dtype).to(device) if bias else None,
        values=values.to(values_dtype).to(device),
        indices=indices.to(index_dtype).to(device),
    )


def dense_results(layer: SparseLayer, grad_out: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """y and all gradients of the dense layer in `dtype`, in PyTorch's own words; that of values is gathered."""
    dense = layer.map(lambda tensor: tensor.detach().to(dtype)).training(*TENSORS)
    y = linear(dense.x, dense.weight, dense.bias)
    wanted = {name: tensor for name, tensor in dense.tensors().items() if name != "values"}
    found = dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad_out.to(dtype)), strict=True))
    return {"y": y.detach(), **found, "values": found["weight"].flatten()[layer.indices.long()]}


def results(layer: SparseLayer, grad_out: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """y and the gradients of all tensors of `layer` that require one."""
    y = layer(**options)
    wanted = {name: tensor for name, tensor in layer.tensors().items() if tensor.requires_grad}
    found = torch.autograd.grad(y, list(wanted.values()), torch.ones_like(y) if grad_out is None else grad_out)
    return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}


def random_module(
    in_features: int = 24,
    out_features: int = 20,
    num_deltas: int = 37,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> tuple[SparseDeltaLinear, Tensor]:
    """A `SparseDeltaLinear` whose values are drawn at random, and a copy of its weight without the delta."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = SparseDeltaLinear(in_features, out_features, num_deltas=num_deltas, dtype=dtype, **options)
        original = layer.weight.detach().clone()
        with torch.no_grad():
            layer.values.normal_(std=0.3)
    return layer, original


def weight_with(layer: SparseDeltaLinear, original: Tensor) -> Tensor:
    """What the layer's weight must hold: `original` with the delta added in a wide dtype and rounded once."""
    wide = torch.float64 if original.dtype == torch.float64 else torch.float32
    expected, positions = original.clone(), layer.indices.long()
    values = layer.values.detach()
    expected.view(-1)[positions] = (original.view(-1)[positions].to(wide) + values.to(wide)).to(original.dtype)
    return expected
