"""Inputs for the operators of token elimination: no row kept, some, all, with and without holes in the list.

Letters as in `peft_kernels/reference/token_elimination.py`: M rows, S of them kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..reference.lora import accumulation_dtype
from .case import Case

_SHAPES = ((0, 9), (1, 2), (33, 70), (130, 257))  # M, columns
_SHARES = (0.0, 0.4, 1.0)


class _Inputs:
    """Random tensors of one shape and one list of rows."""

    def __init__(self, sizes: tuple[int, int], share: float, holes: bool, dtype: torch.dtype, seed: int) -> None:
        self.total, self.columns = sizes
        self.dtype, self.holes = dtype, holes
        self.generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(self.total, generator=self.generator)[: round(self.total * share)].sort().values
        if holes:  # stand for no row, as at the end of each sequence's part
            middle, none = rows.shape[0] // 2, torch.full((2,), -1)
            rows = torch.cat((rows[:middle], none, rows[middle:], none))
        self.rows = rows.to(torch.int32)
        self.count = rows.shape[0]

    def normal(self, *shape: int, sums: bool = False) -> Tensor:
        """Normal numbers in the activations' dtype, or in that of their sums."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return values.to(accumulation_dtype(self.dtype) if sums else self.dtype)

    def kept(self) -> Tensor:
        """`[S, C]`, with zeros where there is no row."""
        return torch.where((self.rows >= 0)[:, None], self.normal(self.count, self.columns), 0.0).to(self.dtype)

    def rstd(self) -> Tensor:
        """`[S]`, positive."""
        return self.normal(self.count, sums=True).abs() + 0.5


def _gather(i: _Inputs) -> tuple[Any, ...]:
    return i.normal(i.total, i.columns), i.rows


def _scatter(i: _Inputs) -> tuple[Any, ...]:
    return i.normal(i.total, i.columns), i.normal(i.count, i.columns), i.rows


def _norm(i: _Inputs) -> tuple[Any, ...]:
    rows = i.rows if i.holes else None
    return i.normal(i.total, i.columns), rows, i.normal(i.columns, sums=True), 1e-5, 1.0 if i.holes else 0.0


def _norm_again(i: _Inputs) -> tuple[Any, ...]:
    return i.kept(), i.rstd(), i.normal(i.columns, sums=True), 1.0


def _norm_backward(i: _Inputs) -> tuple[Any, ...]:
    residual = i.normal(i.total, i.columns) if i.holes else None
    numbers = i.normal(i.count, i.columns), i.kept(), i.rstd(), i.normal(i.columns, sums=True)
    return residual, *numbers, 0.0, i.rows, i.total, True


def _rope(i: _Inputs) -> tuple[Any, ...]:
    angles = 3 * i.normal(i.total, i.columns // 2 * 2, sums=True)
    return i.normal(i.count, 3, i.columns), angles.cos(), angles.sin(), i.rows, i.holes


def _linear(i: _Inputs) -> tuple[Any, ...]:
    weight = i.normal(i.columns + 3, i.columns) / i.columns**0.5
    residual, bias = i.normal(i.total, i.columns + 3), i.normal(i.columns + 3)
    if i.holes:
        return i.normal(i.total, i.columns), weight, bias, i.rows, residual, True, False
    return i.kept(), weight.t().contiguous(), None, i.rows, residual, False, True


def _linear_in_place(i: _Inputs) -> tuple[Any, ...]:
    x, weight, bias, rows, residual, gather, transposed = _linear(i)
    return residual, x, weight, bias, rows, gather, transposed


_ARGUMENTS: dict[str, Callable[[_Inputs], tuple[Any, ...]]] = {
    "gather_rows": _gather,
    "scatter_add_rows": _scatter,
    "scatter_add_rows_": _scatter,
    "gather_rms_norm": _norm,
    "rms_norm_rows": _norm_again,
    "gather_rms_norm_backward": _norm_backward,
    "rope_rows": _rope,
    "gather_linear_scatter": _linear,
    "gather_linear_scatter_": _linear_in_place,
}
_MUTATED = {"scatter_add_rows_": (0,), "gather_linear_scatter_": (0,)}

OPERATORS = tuple(_ARGUMENTS)


def cases(operator: str, dtype: torch.dtype) -> Iterator[Case]:
    """The calls that `operator` is checked on with activations of `dtype`."""
    for seed, sizes in enumerate(_SHAPES):
        for share in _SHARES:
            for holes in (False, True):
                inputs = _Inputs(sizes, share, holes, dtype, seed)
                name = "M={} C={}".format(*sizes) + f" {inputs.count} rows{', some of them none' if holes else ''}"
                yield Case(name, _ARGUMENTS[operator](inputs), _MUTATED.get(operator, ()))
