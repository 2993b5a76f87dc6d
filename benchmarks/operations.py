"""What benchmarks of single operations share: inputs that rotate, the check before the timing, the record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from peft_kernels.backends import BackendUnavailable

from .cases import Record, failure
from .harness import Arm, Plan, interleave, summarize
from .served import served

OURS = "ours"
CACHE_BYTES = 2**28
"""Together more than any cache holds."""
_AT_MOST = 256
_FLUSHED_BYTES = 2**30

Item = TypeVar("Item")
Work = Callable[[int], object]
Run = tuple[str, Work | Record]
"""Name of an arm, and one unit of its work, or the record of why there is none."""


def copies(size: int) -> int:
    """Of how many inputs of `size` bytes none stays in a cache until its next turn; for tiny ones, enough."""
    return max(2, min(_AT_MOST, CACHE_BYTES // max(size, 1)))


def turn(items: Sequence[Item], call: Callable[[Item], object]) -> Work:
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


def attempt(name: str, build: Callable[[], Work]) -> Run:
    """An arm that may not be had here, such as one of a package: without it the others are measured."""
    try:
        return name, build()
    except BackendUnavailable as error:
        return name, {"status": "unavailable", "reason": str(error)}
    except Exception as error:
        return name, failure(error)


def head_start(device: torch.device | str) -> Callable[[], object] | None:
    """Untimed work before each arm on a GPU; None on the CPU.

    It writes 1 GiB. So nothing that an arm needs is in L2, and the host has time to queue the arm, 0.3 ms at 3 TB/s:
    what is taken is then the GPU's time and not the host's, as in a training step where the host is ahead.
    """
    if torch.device(device).type == "cpu":
        return None
    buffer = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)
    return lambda: buffer.fill_(1)


def _first_run(work: Work | Record) -> tuple[Work | None, Record]:
    """The work when it runs, and a record with the backends that served it, if any."""
    if isinstance(work, dict):
        return None, work
    try:
        with served() as backends:
            work(0)
    except BackendUnavailable as error:
        return None, {"status": "unavailable", "reason": str(error)}
    except Exception as error:
        return None, failure(error)
    return work, {"backends": backends} if backends else {}


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
        made = make()
    except Exception as error:
        return {"limits": dict(limits), "arms": {OURS: failure(error)}}
    prepare, arms = head_start(device), []
    records: dict[str, Record] = {}
    for name, given in made:
        work, records[name] = _first_run(given)
        if work is not None:
            arms.append(Arm(name, work, prepare))
    if arms:
        for name, times in summarize(interleave(arms, plan, device), bases).items():
            records[name].update(times, status="measured")
    return {"limits": dict(limits), "arms": records}


def times(record: Record) -> str:
    """Every arm's time, or why it has none."""
    return ", ".join(
        f"{name} {arm['median_s'] * 1e6:.0f} us" if arm["status"] == "measured" else f"{name} {arm['reason']}"
        for name, arm in record["arms"].items()
    )
