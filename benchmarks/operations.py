"""What benchmarks of single operations share: inputs that rotate, the check before the timing, the record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .cases import Record, failure
from .harness import Arm, Plan, interleave, summarize

OURS = "ours"
CACHE_BYTES = 2**28
"""Together more than any cache holds."""
_AT_MOST = 256

Item = TypeVar("Item")
Run = tuple[str, Callable[[int], object]]
"""Name of an arm, and one unit of its work."""


def copies(size: int) -> int:
    """Of how many inputs of `size` bytes none stays in a cache until its next turn; for tiny ones, enough."""
    return max(2, min(_AT_MOST, CACHE_BYTES // max(size, 1)))


def turn(items: Sequence[Item], call: Callable[[Item], object]) -> Callable[[int], object]:
    """`call` on the next of `items`, a counter of its own for each arm: no two arms in a row get the same one."""
    position = [0]

    def run(_: int) -> object:
        position[0] += 1
        return call(items[position[0] % len(items)])

    return run


def require_equal(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises RuntimeError when the two differ by more than `tolerance` in norm, relative to `expected`."""
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    if not error <= tolerance:
        raise RuntimeError(f"{name} is {error:.1e} off what it is compared with, so it gets no time")


def measure(
    make: Callable[[], Sequence[Run]],
    limits: Mapping[str, object],
    bases: Sequence[str],
    plan: Plan,
    device: torch.device | str,
) -> Record:
    """Seconds of every arm of one case.

    Args:
        make: builds the arms, and raises when one of them is wrong.
        limits: what the operation must cost at least.
        bases: the arms that ratios are taken to.
    """
    try:
        arms = [Arm(name, run) for name, run in make()]
    except Exception as error:
        return {"limits": dict(limits), "arms": {OURS: failure(error)}}
    times = summarize(interleave(arms, plan, device), bases)
    return {"limits": dict(limits), "arms": {name: {**arm, "status": "measured"} for name, arm in times.items()}}


def times(record: Record) -> str:
    """Every arm's time, or why it has none."""
    return ", ".join(
        f"{name} {arm['median_s'] * 1e6:.0f} us" if arm["status"] == "measured" else f"{name} {arm['reason']}"
        for name, arm in record["arms"].items()
    )
