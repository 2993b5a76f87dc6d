"""Which entries a selection drops and which it grows; of equal ones the smaller position comes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..nn.positions import random_positions
from ..nn.sparse_delta import SparseDeltaLinear
from . import ranks
from .window import Window


@dataclass(frozen=True)
class Growth:
    """Entries to grow.

    Attributes:
        positions: `[n]` sorted, in the layer's index dtype, none of them active.
        mean: `[n]` mean of the gradients that were seen there, or None where none were looked at.
        mean_square: `[n]` mean of their squares, or None.
    """

    positions: Tensor
    mean: Tensor | None = None
    mean_square: Tensor | None = None


def kept(values: Tensor, drop: int) -> Tensor:
    """bool `[nnz]`: all but the `drop` smallest by magnitude."""
    result = torch.ones(values.shape, dtype=torch.bool, device=values.device)
    result[values.abs().sort(stable=True).indices[:drop]] = False
    return result


def by_gradient(window: Window, count: int) -> Growth:
    """The candidates whose gradients have added up to the most."""
    assert window.candidates is not None and window.total is not None and window.total_squares is not None
    order = window.total.abs().sort(descending=True, stable=True).indices
    chosen = order[:count].sort().values
    total, squares = window.total[chosen], window.total_squares[chosen]
    return Growth(window.candidates[chosen], total / window.steps, squares / window.steps)


def by_moments(layer: SparseDeltaLinear, state: dict[str, Any], count: int) -> Growth:
    """The largest products of SM3's maxima of row and column: an estimate of the second moment where none is kept."""
    dtype = torch.promote_types(layer.values.dtype, torch.float32)
    rows, columns = state["row_max"].to(dtype), state["column_max"].to(dtype)
    return _growth(layer, ops.outer_product_topk(rows, columns, count, exclude=layer.indices))


def by_magnitude(layer: SparseDeltaLinear, count: int) -> Growth:
    """The largest entries of the weight that do not train."""
    if count == 0:
        return _growth(layer, layer.indices[:0])
    scores = layer.weight.detach().flatten().abs()
    scores[layer.indices.to(torch.int64)] = -1
    least = scores.topk(count, sorted=False).values.min()
    above = (scores > least).nonzero().view(-1)
    level = (scores == least).nonzero().view(-1)[: count - above.numel()]
    return _growth(layer, torch.cat((above, level)).sort().values)


def at_random(layer: SparseDeltaLinear, count: int, generator: torch.Generator) -> Growth:
    """Positions drawn evenly from those that do not train."""
    active = layer.indices.to(torch.int64)
    drawn = random_positions(layer.weight.numel() - active.numel(), count, generator).to(torch.int64)
    drawn = ranks.from_first(drawn.to(active.device))
    # The r-th free position has as many active ones before it as are preceded by r free positions or fewer.
    free_before = active - torch.arange(active.numel(), device=active.device)
    return _growth(layer, drawn + torch.searchsorted(free_before, drawn, right=True))


def _growth(layer: SparseDeltaLinear, positions: Tensor) -> Growth:
    return Growth(positions.to(layer.indices.dtype))
