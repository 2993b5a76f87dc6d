"""Several adapters as one: the sum of their changes, on the union of their channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..channels.slices import Slice
from .adapter import SliceAdapter, SliceUpdate


def fuse(adapters: Sequence[SliceAdapter], weights: Sequence[float] | None = None) -> SliceAdapter:
    """`sum_i weights[i] * adapters[i]`: where channels are disjoint, each adapter stays as it was trained.

    Args:
        adapters: of one base model; not empty.
        weights: one per adapter; None means 1 for each.

    Returns:
        Changes in the widest of the adapters' dtypes, summed in float64 and rounded once.

    Raises:
        ValueError: no adapter, not as many weights, or two adapters that change different dimensions of one layer.
    """
    if not adapters:
        raise ValueError("adapters must not be empty")
    weights = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be {len(adapters)} finite numbers, got {weights!r}")
    paths = dict.fromkeys(path for adapter in adapters for path in adapter)
    updates = {}
    for path in paths:
        parts = [(adapter[path], weight) for adapter, weight in zip(adapters, weights, strict=True) if path in adapter]
        updates[path] = _fused(path, parts)
    names = {adapter.base_model for adapter in adapters}
    return SliceAdapter(updates, names.pop() if len(names) == 1 else None)


def _fused(path: str, parts: list[tuple[SliceUpdate, float]]) -> SliceUpdate:
    first = parts[0][0]
    for part, _ in parts:
        if part.axis != first.axis or part.shape != first.shape:
            raise ValueError(
                f"{path}: adapters change {first.slice.dim} channels of a weight {list(first.shape)} and "
                f"{part.slice.dim} channels of one {list(part.shape)}, which no one slice holds"
            )
    indices = torch.cat([part.slice.indices for part, _ in parts]).unique()
    shape = list(first.shape)
    shape[first.axis] = indices.numel()
    total = torch.zeros(shape, dtype=torch.float64, device=first.change.device)
    dtype = first.change.dtype
    for part, weight in parts:
        places = torch.searchsorted(indices, part.slice.indices).to(total.device)
        total.index_add_(first.axis, places, part.change.to(total.device, torch.float64), alpha=weight)
        dtype = torch.promote_types(dtype, part.change.dtype)
    return SliceUpdate(Slice(indices, first.slice.dim), total.to(dtype), first.shape)


def overlap(first: SliceAdapter, second: SliceAdapter) -> int:
    """How many channels both change; 0 for adapters that do not interfere when fused."""
    return sum(_common(first[path], second[path]) for path in first.keys() & second.keys())


def _common(first: SliceUpdate, second: SliceUpdate) -> int:
    if first.axis != second.axis:  # each row meets each column
        return min(first.slice.indices.numel(), second.slice.indices.numel())
    found: Tensor = torch.isin(first.slice.indices, second.slice.indices)
    return int(found.sum())
