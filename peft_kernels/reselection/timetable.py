"""When entries are reselected, and how many of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("linear", "cosine")


@dataclass(frozen=True)
class Timetable:
    """R = `reselection_steps`, A = `selection_accumulation_steps`, T = `total_steps`, all in optimizer steps.

    Gradients are looked at in windows of A steps that open at the steps 0, R, 2R and so on; entries move as a window
    ends, at A, A + R, A + 2R. So the first move, which replaces positions that were chosen before any gradient was
    known, comes as soon as there is something to choose by. A window that would end after T does not open.

    Raises:
        ValueError: a number is out of range.
    """

    reselection_steps: int
    selection_accumulation_steps: int
    initial_reselection_rate: float
    schedule: str
    total_steps: int

    def __post_init__(self) -> None:
        for name in ("reselection_steps", "selection_accumulation_steps", "total_steps"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {number!r}")
        if self.selection_accumulation_steps > self.reselection_steps:
            raise ValueError(
                f"selection_accumulation_steps must be at most reselection_steps, {self.reselection_steps}, "
                f"got {self.selection_accumulation_steps}"
            )
        rate = self.initial_reselection_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 <= rate <= 1.0:
            raise ValueError(f"initial_reselection_rate must be in [0, 1], got {rate!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")

    def opens(self, completed: int) -> bool:
        """Whether a window opens behind step number `completed`."""
        return (
            completed % self.reselection_steps == 0
            and completed + self.selection_accumulation_steps <= self.total_steps
        )

    def ends(self, completed: int) -> bool:
        """Whether step number `completed`, of at least 1, is the last one of a window."""
        return (completed - self.selection_accumulation_steps) % self.reselection_steps == 0

    def is_first(self, completed: int) -> bool:
        """Whether the window that ends there is the first one."""
        return completed == self.selection_accumulation_steps

    def rate(self, completed: int) -> float:
        """The share of the entries that move at step t: rate (1 - t / T), or rate (1 + cos(pi t / T)) / 2."""
        progress = min(completed / self.total_steps, 1.0)
        remaining = 1.0 - progress if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.initial_reselection_rate * remaining
