"""Inputs for the operators of the sparse-delta family: no entry, one, some, all; both kinds of indices.

Letters as in `peft_kernels/reference/sparse_delta.py`: M rows, K and N columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..reference.lora import accumulation_dtype
from .case import Case

_SHAPES = ((0, 9, 5), (1, 1, 1), (33, 70, 41), (130, 257, 96))  # M, K, N
_DENSITIES = (0.0, 0.05, 1.0)


class _Inputs:
    """Random tensors of one shape; `values` in the dtype that sums have."""

    def __init__(self, sizes: tuple[int, int, int], density: float, wide: bool, dtype: torch.dtype, seed: int) -> None:
        self.rows, self.columns, self.out_columns = sizes
        self.dtype, self.wide = dtype, wide
        self.generator = torch.Generator().manual_seed(seed)
        numel = self.columns * self.out_columns
        self.count = round(numel * density)
        chosen = torch.randperm(numel, generator=self.generator)[: self.count].sort().values
        self.indices = chosen if wide else chosen.to(torch.int32)

    def normal(self, *shape: int, sums: bool = False) -> Tensor:
        """Normal numbers in the activations' dtype, or in that of their sums."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return values.to(accumulation_dtype(self.dtype) if sums else self.dtype)

    def entries(self) -> Tensor:
        """One number per entry, in the dtype of the sums."""
        return self.normal(self.count, sums=True)


def _write(i: _Inputs) -> tuple[Any, ...]:
    return i.normal(i.out_columns, i.columns), i.indices, i.normal(i.count), i.entries()


def _accumulate(i: _Inputs) -> tuple[Any, ...]:
    return i.normal(i.out_columns, i.columns), i.indices, i.entries(), -0.7


def _sampled(i: _Inputs) -> tuple[Any, ...]:
    return i.normal(i.rows, i.out_columns), i.normal(i.rows, i.columns), i.indices, accumulation_dtype(i.dtype)


def _adamw(i: _Inputs) -> tuple[Any, ...]:
    moments = (i.entries(), i.entries().square())
    target = (i.normal(i.out_columns, i.columns), i.indices, i.normal(i.count))
    return i.entries(), i.entries(), *moments, *target, 3, 1e-2, 0.9, 0.99, 1e-8, 0.1


def _sm3(i: _Inputs) -> tuple[Any, ...]:
    maxima = (i.normal(i.out_columns, sums=True).abs(), i.normal(i.columns, sums=True).abs())
    target = (i.normal(i.out_columns, i.columns), i.indices, i.normal(i.count))
    return i.entries(), i.entries(), *maxima, i.entries(), *target, 1e-2, 0.9, 1e-8, 0.1


_ARGUMENTS: dict[str, Callable[[_Inputs], tuple[Any, ...]]] = {
    "scatter_write_": _write,
    "scatter_accumulate_": _accumulate,
    "sampled_product": _sampled,
    "sparse_adamw_": _adamw,
    "sparse_sm3_": _sm3,
}
_MUTATED = {
    "scatter_write_": (0,),
    "scatter_accumulate_": (0,),
    "sparse_adamw_": (0, 2, 3, 4),
    "sparse_sm3_": (0, 2, 3, 4, 5),
}

OPERATORS = tuple(_ARGUMENTS)


def cases(operator: str, dtype: torch.dtype) -> Iterator[Case]:
    """The calls that `operator` is checked on with a weight or activations of `dtype`."""
    for seed, sizes in enumerate(_SHAPES):
        for density in _DENSITIES:
            for wide in (False, True):
                inputs = _Inputs(sizes, density, wide, dtype, seed)
                name = "M={} K={} N={}".format(*sizes) + f" {inputs.count} entries, {inputs.indices.dtype}"
                yield Case(name, _ARGUMENTS[operator](inputs), _MUTATED.get(operator, ()))
