"""Interleaved timing: arms that are compared run turn by turn in one process, and only ratios are claims.

A machine's speed drifts (clocks, neighbours, caches), so timing arm A a hundred times and then arm B a hundred times
compares two machines. Here round i runs every arm once; the order rotates from round to round and is mirrored every
other cycle, so that no arm always runs after the same neighbour. Two ratios to a base arm come out: the ratio of the
medians, and the median of the per-round ratios with its quartiles, which cancels drift slower than a round.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Arm:
    """One of the things compared.

    Attributes:
        name: as printed in tables.
        run: does one unit of work; takes the round number, to rotate its inputs by. This alone is timed.
        prepare: untimed work before each `run` (dropping the last gradients), or None.
    """

    name: str
    run: Callable[[int], object]
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        warmup: rounds whose times are dropped, at least 1.
        min_rounds, max_rounds: bounds on the rounds kept.
        seconds: rounds are added until this much time has gone by, within the bounds.
    """

    warmup: int = 3
    min_rounds: int = 9
    max_rounds: int = 41
    seconds: float = 15.0

    def __post_init__(self) -> None:
        if self.warmup < 1:
            raise ValueError(f"Plan: warmup must be at least 1, got {self.warmup}")
        if not 1 <= self.min_rounds <= self.max_rounds:
            raise ValueError(f"Plan: need 1 <= min_rounds <= max_rounds, got {self.min_rounds} and {self.max_rounds}")


Samples = dict[str, list[float]]
"""Arm name to seconds per round; position i of every list is round i."""


def order(round_number: int, arms: int) -> list[int]:
    """The order in which `arms` arms run in a round: rotated by one per round, mirrored every other cycle."""
    shift = round_number % arms
    indices = [(shift + i) % arms for i in range(arms)]
    return indices[::-1] if (round_number // arms) % 2 else indices


def interleave(arms: Sequence[Arm], plan: Plan, device: torch.device | str = "cpu") -> Samples:
    """Times `arms` turn by turn on `device`.

    Wall clock on the CPU; CUDA events on a GPU, where a whole round is queued before the host waits, so that the
    device does not idle between arms.

    Returns:
        Seconds per round for every arm, warm-up left out; all lists have the same length.

    Raises:
        ValueError: no arms, or two of the same name.
    """
    names = [arm.name for arm in arms]
    if not arms or len(set(names)) != len(names):
        raise ValueError(f"interleave: arms must be at least one, with distinct names, got {names}")
    one_round = _cuda_round if torch.device(device).type == "cuda" else _cpu_round
    samples: Samples = {name: [] for name in names}
    with _quiet_garbage_collector():
        for i in range(plan.warmup):
            one_round(arms, i)
        started = time.perf_counter()
        for i in range(plan.max_rounds):
            for name, seconds in one_round(arms, plan.warmup + i).items():
                samples[name].append(seconds)
            if i + 1 >= plan.min_rounds and time.perf_counter() - started >= plan.seconds:
                break
    return samples


@contextmanager
def _quiet_garbage_collector():  # type: ignore[no-untyped-def]
    """Collects cycles now and not inside a timed region."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _cpu_round(arms: Sequence[Arm], round_number: int) -> dict[str, float]:
    seconds = {}
    for index in order(round_number, len(arms)):
        arm = arms[index]
        if arm.prepare is not None:
            arm.prepare()
        started = time.perf_counter()
        arm.run(round_number)
        seconds[arm.name] = time.perf_counter() - started
    return seconds


def _cuda_round(arms: Sequence[Arm], round_number: int) -> dict[str, float]:
    events = {}
    for index in order(round_number, len(arms)):
        arm = arms[index]
        if arm.prepare is not None:
            arm.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        arm.run(round_number)
        end.record()
        events[arm.name] = (start, end)
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def summarize(samples: Samples, bases: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Medians, quartiles and ratios to each arm named in `bases` (those not measured are left out).

    Returns, for every arm, `{"median_s", "q1_s", "q3_s", "min_s", "rounds", "relative_to": {base: {"ratio_of_medians",
    "median_of_ratios", "q1", "q3"}}}`. A ratio above 1 means slower than the base.
    """
    summary = {}
    for name, values in samples.items():
        first, median, third = spread(values)
        summary[name] = {
            "median_s": median,
            "q1_s": first,
            "q3_s": third,
            "min_s": min(values),
            "rounds": len(values),
            "relative_to": {base: _ratio(values, samples[base]) for base in bases if base in samples and base != name},
        }
    return summary


def _ratio(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    first, median, third = spread([value / other for value, other in zip(values, base, strict=True)])
    return {
        "ratio_of_medians": statistics.median(values) / statistics.median(base),
        "median_of_ratios": median,
        "q1": first,
        "q3": third,
    }


def rotation(make: Callable[[int], torch.Tensor], device: torch.device | str, at_most: int = 8) -> list[torch.Tensor]:
    """Inputs to cycle through so that none is still in the cache: on a GPU, together over twice its L2.

    Args:
        make: builds input number i; must not return zeros, on which a GPU draws less power and runs faster.
        at_most: never more than this many.
    """
    first = make(0)
    copies = 2
    if torch.device(device).type == "cuda":
        level_2 = torch.cuda.get_device_properties(device).L2_cache_size
        copies = max(2, -(-2 * level_2 // max(first.nbytes, 1)) + 1)
    return [first, *(make(i) for i in range(1, min(copies, at_most)))]
