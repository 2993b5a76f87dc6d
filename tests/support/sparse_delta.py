"""Sparse deltas to test with: a weight, sorted positions in it, what it holds there, and values to add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

ADAMW = {"lr": 0.02, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SM3 = {"lr": 0.02, "beta": 0.9, "eps": 1e-8, "weight_decay": 0.1}
IN_PLACE = ("scatter_write_", "scatter_accumulate_", "sparse_adamw_", "sparse_sm3_")
SELECTION = ("outer_product_topk", "product_above", "sorted_merge", "sorted_contains")
OPERATORS = (*IN_PLACE, "sampled_product", *SELECTION)
CHANGED = {
    "scatter_write_": ("weight",),
    "scatter_accumulate_": ("weight",),
    "sparse_adamw_": ("values", "exp_avg", "exp_avg_sq", "weight"),
    "sparse_sm3_": ("values", "row_max", "column_max", "exp_avg", "weight"),
}
"""Operator to the arguments that it changes."""


@dataclass(frozen=True)
class Delta:
    """A weight and a delta of some of its entries, with the state of AdamW and of SM3."""

    weight: Tensor
    indices: Tensor
    original: Tensor
    values: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    row_max: Tensor
    column_max: Tensor

    def copy(self) -> Delta:
        """The same in memory of its own."""
        return self.map(torch.clone)

    def map(self, function: Callable[[Tensor], Tensor]) -> Delta:
        """The delta with `function` applied to every floating point tensor."""
        tensors = {name: value for name, value in vars(self).items() if value.is_floating_point()}
        return replace(self, **{name: function(value) for name, value in tensors.items()})

    def arguments(self, operator: str, **changes: Any) -> dict[str, Any]:
        """The arguments of a call by name, in the order of the schema, with `changes` made."""
        if operator == "scatter_write_":
            names, numbers = ("weight", "indices", "original", "values"), {}
        elif operator == "scatter_accumulate_":
            names, numbers = ("weight", "indices", "values"), {"scaling": -1.7}
        elif operator == "sparse_adamw_":
            names = ("values", "grad", "exp_avg", "exp_avg_sq", "weight", "indices", "original")
            numbers = {"step": 3, **ADAMW}
        elif operator == "sparse_sm3_":
            names = ("values", "grad", "row_max", "column_max", "exp_avg", "weight", "indices", "original")
            numbers = SM3
        else:
            raise ValueError(f"no arguments for operator {operator!r}")
        return {**{name: getattr(self, name) for name in names}, **numbers, **changes}

    def run(self, kernel: Callable[..., None], operator: str, **changes: Any) -> dict[str, Tensor]:
        """What the call changes, by name, in a copy of this delta."""
        arguments = self.copy().arguments(operator, **changes)
        kernel(*arguments.values())
        return {name: arguments[name] for name in CHANGED[operator] if arguments[name] is not None}


def random_delta(
    shape: tuple[int, ...] = (20, 24),
    count: int = 37,
    *,
    dtype: torch.dtype = torch.float32,
    values_dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int32,
    device: str = "cpu",
    seed: int = 0,
) -> Delta:
    """A weight of normal numbers and `count` of its entries, drawn without repetition, after a step or two.

    Rows and columns, which SM3 knows, are those of a weight that is folded into a matrix.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    weight = normal(*shape).to(dtype)
    indices = torch.randperm(weight.numel(), generator=generator)[:count].sort().values
    original = weight.view(-1)[indices].clone()
    state = [normal(count), normal(count), 0.3 * normal(count), 0.3 * normal(count).square()]
    columns = shape[-1] if shape else 1
    state += [0.3 * normal(weight.numel() // max(columns, 1)).square(), 0.3 * normal(columns).square()]
    placed = [tensor.to(values_dtype).to(device) for tensor in state]
    return Delta(weight.to(device), indices.to(index_dtype).to(device), original.to(device), *placed)
