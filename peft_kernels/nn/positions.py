"""Which entries of a weight a sparse delta changes, chosen before any gradient is known."""

from __future__ import annotations

import torch
from torch import Tensor

INT32_ELEMENTS = 2**31
"""Positions in a weight of at most as many elements fit int32."""


def index_dtype(numel: int) -> torch.dtype:
    """int32 where it can hold every position in a weight of `numel` elements, else int64."""
    return torch.int32 if numel <= INT32_ELEMENTS else torch.int64


def number_of(numel: int, density: float | None, num_deltas: int | None) -> int:
    """How many entries to change of `numel`; raises ValueError unless exactly one of the two says so, in range."""
    if (density is None) == (num_deltas is None):
        raise ValueError(f"give either density or num_deltas, got density={density!r}, num_deltas={num_deltas!r}")
    if density is not None:
        if isinstance(density, bool) or not isinstance(density, int | float) or not 0.0 < density <= 1.0:
            raise ValueError(f"density must be in (0, 1], got {density!r}")
        return max(1, round(density * numel)) if numel else 0
    if isinstance(num_deltas, bool) or not isinstance(num_deltas, int) or not 0 <= num_deltas <= numel:
        raise ValueError(f"num_deltas must be an integer in [0, {numel}], got {num_deltas!r}")
    return num_deltas


def random_positions(numel: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` of `numel` positions, drawn evenly without repetition; sorted, on the CPU, so that one seed gives one
    choice on every device."""
    if 4 * count >= numel:
        chosen = torch.randperm(numel, generator=generator, device="cpu")[:count].sort().values
    else:  # draws that repeat are made again: each new position is even over those that are left
        chosen = torch.empty(0, dtype=torch.int64, device="cpu")
        while chosen.numel() < count:
            drawn = torch.randint(numel, (count - chosen.numel(),), generator=generator, device="cpu")
            chosen = torch.cat((chosen, drawn)).unique()
    return chosen.to(index_dtype(numel))


def largest_positions(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest of `scores`, sorted; on scores' device."""
    chosen = scores.flatten().topk(count, sorted=False).indices.sort().values
    return chosen.to(index_dtype(scores.numel()))
