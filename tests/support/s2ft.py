"""Slices of channels to test with: a weight, some of its channels, and what trains there after a step or two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .sparse_delta import ADAMW

IN_PLACE = ("slice_write_", "slice_exchange_", "slice_adamw_")
OPERATORS = (*IN_PLACE, "gather_columns", "slice_grad", "swiglu", "swiglu_backward")
CHANGED = {
    "slice_write_": ("weight",),
    "slice_exchange_": ("weight", "original"),
    "slice_adamw_": ("trainable", "exp_avg", "exp_avg_sq", "weight"),
}
"""Operator to the arguments that it changes."""


@dataclass(frozen=True)
class ChannelSlice:
    """A weight `[N, K]` and some of its columns (dim 1) or rows (dim 0), with the state of AdamW.

    `held`, in weight's dtype, belongs to the channels behind these, of which some may be the same.
    """

    weight: Tensor
    indices: Tensor
    trainable: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    held: Tensor
    dim: int

    @property
    def held_indices(self) -> Tensor:
        """The channels behind these, the first one behind the last."""
        return ((self.indices + 1) % max(self.weight.shape[self.dim], 1)).sort().values

    def copy(self) -> ChannelSlice:
        """The same in memory of its own."""
        return self.map(torch.clone)

    def map(self, function: Callable[[Tensor], Tensor]) -> ChannelSlice:
        """The slice with `function` applied to every floating point tensor."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor) and v.is_floating_point()}
        return replace(self, **{name: function(value) for name, value in tensors.items()})

    def arguments(self, operator: str, **changes: Any) -> dict[str, Any]:
        """The arguments of a call by name, in the order of the schema, with `changes` made."""
        if operator == "slice_write_":
            own = {"weight": self.weight, "indices": self.indices, "values": self.trainable, "dim": self.dim}
        elif operator == "slice_exchange_":
            own = {"weight": self.weight, "held_indices": self.held_indices, "held": self.held}
            own |= {"indices": self.indices, "change": self.trainable}
            own |= {"original": torch.full_like(self.held, torch.nan), "dim": self.dim}
        elif operator == "slice_adamw_":
            names = ("trainable", "grad", "exp_avg", "exp_avg_sq", "weight", "indices", "dim")
            own = {**{name: getattr(self, name) for name in names}, "step": 3, **ADAMW}
        else:
            raise ValueError(f"no arguments for operator {operator!r}")
        return {**own, **changes}

    def run(self, kernel: Callable[..., None], operator: str, **changes: Any) -> dict[str, Tensor]:
        """What the call changes, by name, in a copy of this slice."""
        arguments = self.copy().arguments(operator, **changes)
        kernel(*arguments.values())
        return {name: arguments[name] for name in CHANGED[operator] if arguments[name] is not None}


def random_channels(channels: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` of `channels` channels, sorted."""
    return torch.randperm(channels, generator=generator)[:count].sort().values


def random_slice(
    shape: tuple[int, int] = (20, 24),
    count: int = 5,
    dim: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    values_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> ChannelSlice:
    """A weight of normal numbers and `count` of its channels, after a step or two."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    weight = normal(*shape).to(dtype)
    indices = random_channels(shape[dim], count, generator)
    size = (count, shape[1]) if dim == 0 else (shape[0], count)
    state = [normal(*size), normal(*size), 0.3 * normal(*size), 0.3 * normal(*size).square()]
    held = normal(*size).to(dtype).to(device)
    placed = [tensor.to(values_dtype).to(device) for tensor in state]
    return ChannelSlice(weight.to(device), indices.to(device), *placed, held=held, dim=dim)
