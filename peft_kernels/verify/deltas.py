"""Inputs for the operators of the delta algebra: packed and dense deltas, no entry, some, all; rows of odd lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..reference import deltas as reference
from .case import Case

_SHAPES = ((1, 1), (7, 33), (3, 2500), (70, 129))
_DENSITIES = (0.0, 0.05, 1.0)


class _Inputs:
    """Two random deltas of one matrix. Keys are those of float64 only where the values are."""

    def __init__(self, shape: tuple[int, int], density: float, dtype: torch.dtype, seed: int) -> None:
        self.columns, self.numel = shape[1], shape[0] * shape[1]
        self.wide = dtype == torch.float64
        self.work = torch.float64 if self.wide else torch.float32
        self.dtype = dtype
        generator = torch.Generator().manual_seed(seed)
        count = int(self.numel * density)
        self.indices, self.values = [], []
        for _ in range(2):
            chosen = torch.randperm(self.numel, generator=generator)[:count].sort().values.to(torch.int32)
            self.indices.append(chosen if density < 1.0 else chosen[:0])
            self.values.append(torch.randn(count, generator=generator, dtype=torch.float64).to(dtype) * 0.5)
        self.count = count
        self.mask = torch.rand(count, generator=generator) < 0.3
        # Exact in the values' dtype: another rounding would be another order.
        self.factors = torch.rand(self.columns, generator=generator, dtype=torch.float64).to(dtype).to(self.work)

    def key(self, quantile: float) -> int:
        """The key at a place among the values', 0 where there are none."""
        if self.count == 0:
            return 0
        keys = reference.keys(self.values[0], self.wide).sort().values
        return int(keys[int(quantile * (self.count - 1))])

    def competition(self) -> Tensor:
        """Numbers that all but the largest and smallest lie between."""
        return torch.tensor([[1e-3, 1.5, -0.1, 2.0, 1.0], [1e-3, 1.2, 0.05, 3.0, 0.5]], dtype=torch.float64)


def _count_keys(i: _Inputs) -> tuple[Any, ...]:
    shift = 47 if i.wide else 15
    return torch.zeros(2**16, dtype=torch.int64), i.values[0], i.wide, shift, 16, 0


def _magnitude(i: _Inputs) -> tuple[Any, ...]:
    return i.values[0], i.wide, i.key(0.9), 1, i.key(0.4), reference.ALL_TIES


def _row(i: _Inputs) -> tuple[Any, ...]:
    return i.indices[0], i.values[0], i.factors, i.columns, i.wide, 1, i.columns // 2 + 1


def _random(i: _Inputs) -> tuple[Any, ...]:
    return i.indices[0], i.values[0], i.columns, 0.4, torch.tensor([7, 2**40 + 3])


def _compact(i: _Inputs) -> tuple[Any, ...]:
    return i.indices[0], i.values[0], i.mask, -1.0


def _sum(i: _Inputs) -> tuple[Any, ...]:
    return i.indices, i.values, [0.75, -1.5], i.numel, i.dtype


def _ties(i: _Inputs) -> tuple[Any, ...]:
    return i.indices, i.values, [1.0, 2.0], i.numel, i.dtype


def _compete(i: _Inputs) -> tuple[Any, ...]:
    return i.indices, i.values, i.competition(), i.numel, i.dtype


def _count_scores(i: _Inputs) -> tuple[Any, ...]:
    # Scores of -1, 0 and 1 exactly, on every machine: magnitudes that count as equal, and products beyond tanh's reach.
    values = [64 * tensor.sign() for tensor in i.values]
    competition = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0]], dtype=torch.float64).repeat(2, 1)
    counts, largest = torch.zeros(2 << 16, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    return counts, largest, i.indices, values, competition, i.numel, 48 if i.wide else 16, 16, [0, 0]


_ARGUMENTS: dict[str, Callable[[_Inputs], tuple[Any, ...]]] = {
    "delta_count_keys_": _count_keys,
    "delta_magnitude_mask": _magnitude,
    "delta_row_mask": _row,
    "delta_random_mask": _random,
    "delta_compact": _compact,
    "delta_sum": _sum,
    "delta_ties": _ties,
    "delta_count_scores_": _count_scores,
    "delta_compete": _compete,
}
_MUTATED = {"delta_count_keys_": (0,), "delta_count_scores_": (0, 1)}

OPERATORS = tuple(_ARGUMENTS)


def cases(operator: str, dtype: torch.dtype) -> Iterator[Case]:
    """The calls that `operator` is checked on with values of `dtype`."""
    for seed, shape in enumerate(_SHAPES):
        for density in _DENSITIES:
            inputs = _Inputs(shape, density, dtype, seed)
            name = f"{shape[0]} x {shape[1]}, {inputs.count} entries" + (", all" if density == 1.0 else "")
            yield Case(name, _ARGUMENTS[operator](inputs), _MUTATED.get(operator, ()))
