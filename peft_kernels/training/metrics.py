"""From step records to the numbers a run reports: medians, spreads and ratios, all taken within the run."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from .arms import OURS, Arm

_FINAL_STEPS = 10


@dataclass(frozen=True)
class ArmSummary:
    """One arm's results.

    Attributes:
        seconds_per_step: median over the timed steps.
        seconds_spread: first and third quartile of the same.
        tokens_per_second: tokens of a step over the median time.
        final_loss: mean training loss of the last 10 steps (or of all, when there are fewer).
        held_out_loss: loss after training on blocks that were not trained on; None when the corpus had none to spare.
        peak_bytes: see `training/memory.py`.
        optimizer_bytes: the most that the optimizer's state took after a step.
        trained_parameters: number of values that the optimizer updates, or may update under a schedule.
    """

    name: str
    seconds_per_step: float
    seconds_spread: tuple[float, float]
    tokens_per_second: float
    final_loss: float
    held_out_loss: float | None
    peak_bytes: int
    optimizer_bytes: int
    trained_parameters: int


def summarize(arm: Arm, tokens_per_step: int, held_out_loss: float | None, peak_bytes: int) -> ArmSummary:
    """The numbers of one arm after training."""
    seconds = timed_seconds(arm)
    median = statistics.median(seconds)
    return ArmSummary(
        name=arm.name,
        seconds_per_step=median,
        seconds_spread=_quartiles(seconds),
        tokens_per_second=tokens_per_step / median,
        final_loss=statistics.fmean(arm.losses()[-_FINAL_STEPS:]),
        held_out_loss=held_out_loss,
        peak_bytes=peak_bytes,
        optimizer_bytes=max(record.optimizer_bytes for record in arm.history),
        trained_parameters=sum(parameter.numel() for parameter in arm.parameters.values()),
    )


def timed_seconds(arm: Arm) -> list[float]:
    """Step times without warm-up; all of them when there are no others."""
    return [record.seconds for record in arm.history if record.timed] or [record.seconds for record in arm.history]


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


@dataclass(frozen=True)
class Row:
    """One line of the results table: a quantity, its text per arm, and ours relative to the other."""

    label: str
    cells: tuple[str, ...]
    ratio: str | None


def results_rows(summaries: list[ArmSummary]) -> list[Row]:
    """The results table, arms in the order given; ratios are ours over the other arm's."""
    rows = [
        _row("tokens per second", summaries, [s.tokens_per_second for s in summaries], "{:,.0f}"),
        _row("seconds per step, median", summaries, [s.seconds_per_step for s in summaries], "{:.3f}"),
        Row("   quartiles", tuple("{:.3f} to {:.3f}".format(*s.seconds_spread) for s in summaries), None),
        _row("peak memory of a step, MiB", summaries, [s.peak_bytes / 2**20 for s in summaries], "{:,.1f}"),
        _row("optimizer state, MiB", summaries, [s.optimizer_bytes / 2**20 for s in summaries], "{:,.1f}"),
        _row("final training loss", summaries, [s.final_loss for s in summaries], "{:.4f}"),
    ]
    held_out = [s.held_out_loss for s in summaries if s.held_out_loss is not None]
    if len(held_out) == len(summaries):
        rows.append(_row("held-out loss", summaries, held_out, "{:.4f}"))
    return rows


def _row(label: str, summaries: list[ArmSummary], values: list[float], form: str) -> Row:
    return Row(label, tuple(form.format(value) for value in values), _ratio(summaries, values))


def _ratio(summaries: list[ArmSummary], values: list[float]) -> str | None:
    if len(summaries) < 2:
        return None
    ours = next(value for value, s in zip(values, summaries, strict=True) if s.name == OURS)
    other = next(value for value, s in zip(values, summaries, strict=True) if s.name != OURS)
    return f"{ours / other:.3f}" if other else None


def curve_difference(arms: list[Arm]) -> float | None:
    """The largest relative difference between the arms' losses of one step; None for a single arm."""
    if len(arms) < 2:
        return None
    pairs = zip(arms[0].losses(), arms[1].losses(), strict=True)
    return max(abs(ours - other) / max(abs(other), 1e-12) for ours, other in pairs)


def summary_as_dict(summary: ArmSummary) -> dict[str, Any]:
    """Plain values for JSON."""
    return asdict(summary)
