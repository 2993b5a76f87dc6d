"""Choosing tensors: the largest importance within a budget of backward FLOPs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .flops import BackwardFlops

QUANTA = 10_000


def select_tensors(
    importance: Mapping[str, float], flops: BackwardFlops, budget: int, quanta: int = QUANTA
) -> frozenset[str]:
    """The parameters with the largest sum of importances whose backward pass costs at most `budget` FLOPs.

    Dynamic programming over the tensors, from the model's output down to its input. Let `best[c]` be the largest
    importance of tensors seen so far whose weight gradients cost at most c. What it costs to pass activation gradients
    down to level l is the same for every set whose lowest tensor is there, so behind each level `best` at what the
    budget leaves for weight gradients is the best of these sets, and the best over all levels is the answer.

    Costs are counted in units of `budget / quanta`: those of tensors rounded up, what is left for them rounded down.
    The true cost never exceeds the budget therefore. What rounding has left over is then given to the tensors that
    still fit, the most important first. Where no rounding takes place, as in a budget of at most `quanta`, the answer
    is exact.

    Args:
        importance: by name, for every tensor of `flops`; those that are not above 0 are never chosen.
        flops: costs.
        budget: FLOPs, at least 1.
        quanta: steps that the budget is divided into. A tensor loses less than `budget / quanta` to rounding; time and
            memory are proportional to it, one byte for each tensor and step.

    Returns:
        The names; empty when nothing fits. Among equals the set that reaches down less wins.

    Raises:
        ValueError: an importance is missing or not finite, or a number is out of range.
    """
    if budget < 1 or quanta < 1:
        raise ValueError(f"budget and quanta must be at least 1, got {budget!r} and {quanta!r}")
    missing = [name for name in flops.tensors if name not in importance]
    if missing:
        raise ValueError(f"importance must hold every tensor of flops, and has no {missing[0]!r}")
    quanta = min(quanta, budget)
    by_level: dict[int, list[str]] = {}
    for name, cost in sorted(flops.tensors.items()):  # so that the order in which they are given makes no difference
        if not -float("inf") < importance[name] < float("inf"):
            raise ValueError(f"importance of {name!r} must be finite, got {importance[name]!r}")
        if importance[name] > 0:
            by_level.setdefault(cost.level, []).append(name)

    best = torch.zeros(quanta + 1, dtype=torch.float64)
    seen: list[tuple[str, int]] = []
    taken: list[torch.Tensor] = []
    value, answer = 0.0, (0, 0)
    for level in sorted(by_level, reverse=True):
        left = (budget - flops.passing_to(level)) * quanta // budget
        if left < 0:
            break
        for name in by_level[level]:
            units = -(-flops.tensors[name].weight_gradient * quanta // budget)
            take = torch.zeros(quanta + 1, dtype=torch.bool)
            if units <= quanta:
                raised = best[: quanta + 1 - units] + importance[name]
                take[units:] = raised > best[units:]
                best[units:] = torch.where(take[units:], raised, best[units:])
            seen.append((name, units))
            taken.append(take)
        if best[left] > value:
            value, answer = float(best[left]), (len(seen), left)

    count, left = answer
    chosen = set()
    for (name, units), take in zip(reversed(seen[:count]), reversed(taken[:count]), strict=True):
        if take[left]:
            chosen.add(name)
            left -= units
    return _filled_up(chosen, importance, flops, budget)


def _filled_up(chosen: set[str], importance: Mapping[str, float], flops: BackwardFlops, budget: int) -> frozenset[str]:
    """With every further tensor that fits, the most important first."""
    others = [name for name in flops.tensors if name not in chosen and importance[name] > 0]
    for name in sorted(others, key=lambda name: (-importance[name], name)):
        if flops.of([*chosen, name]) <= budget:
            chosen.add(name)
    return frozenset(chosen)
