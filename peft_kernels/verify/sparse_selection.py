"""Inputs for the selection of entries: small integers, so that sums are exact and every position is decided.

Letters as in `peft_kernels/reference/sparse_selection.py`: M rows, K and N columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..reference.lora import accumulation_dtype
from .case import Case

_SHAPES = ((0, 9, 5), (1, 1, 1), (33, 70, 41), (130, 257, 96))  # M, K, N
_SHARES = (0.0, 0.05, 0.6)


class _Inputs:
    """Random integers of one shape, and some of the positions of the product."""

    def __init__(self, sizes: tuple[int, int, int], share: float, wide: bool, dtype: torch.dtype, seed: int) -> None:
        self.rows, self.columns, self.out_columns = sizes
        self.share, self.dtype, self.wide = share, dtype, wide
        self.generator = torch.Generator().manual_seed(seed)
        self.entries = self.columns * self.out_columns

    def integers(self, low: int, *shape: int, sums: bool = False) -> Tensor:
        """Integers from `low` to 7 in the activations' dtype, or in that of their sums."""
        values = torch.randint(low, 8, shape, generator=self.generator)
        return values.to(accumulation_dtype(self.dtype) if sums else self.dtype)

    def positions(self, count: int) -> tuple[Tensor, Tensor]:
        """Sorted positions, and others without a common one."""
        drawn = torch.randperm(self.entries, generator=self.generator)
        chosen = drawn if self.wide else drawn.to(torch.int32)
        return chosen[:count].sort().values, chosen[count:].sort().values


def _outer(i: _Inputs) -> tuple[Any, ...]:
    excluded, others = i.positions(int(i.share * i.entries))
    count = int(0.3 * others.numel()) + 1
    return i.integers(0, i.out_columns, sums=True), i.integers(0, i.columns, sums=True), count, excluded


def _above(i: _Inputs) -> tuple[Any, ...]:
    grad_out, x = i.integers(-7, i.rows, i.out_columns), i.integers(-7, i.rows, i.columns)
    size = (grad_out.double().t() @ x.double()).abs()
    threshold = float(size.flatten().sort().values[int(i.share * (i.entries - 1))])
    return grad_out, x, threshold, int((size >= threshold).sum())


def _merge(i: _Inputs) -> tuple[Any, ...]:
    return i.positions(int(i.share * i.entries))


def _contains(i: _Inputs) -> tuple[Any, ...]:
    return i.positions(i.entries // 2)[0], i.positions(int(i.share * i.entries))[0]


_ARGUMENTS: dict[str, Callable[[_Inputs], tuple[Any, ...]]] = {
    "outer_product_topk": _outer,
    "product_above": _above,
    "sorted_merge": _merge,
    "sorted_contains": _contains,
}

OPERATORS = tuple(_ARGUMENTS)


def cases(operator: str, dtype: torch.dtype) -> Iterator[Case]:
    """The calls that `operator` is checked on with activations of `dtype`, or factors in the dtype of their sums."""
    for seed, sizes in enumerate(_SHAPES):
        for share in _SHARES:
            for wide in (False, True):
                name = "M={} K={} N={}".format(*sizes) + f" share {share}, {'int64' if wide else 'int32'}"
                yield Case(name, _ARGUMENTS[operator](_Inputs(sizes, share, wide, dtype, seed)))
