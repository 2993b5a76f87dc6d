"""The two pictures of a run: loss curve and step time."""

from __future__ import annotations

import statistics
from pathlib import Path

from .arms import OURS, Arm
from .errors import require
from .metrics import timed_seconds

_COLORS = {OURS: "#0f766e"}
_OTHER = "#c2410c"


def draw_plots(arms: list[Arm], output: Path) -> tuple[Path, Path]:
    """Writes `loss.png` and `step_time.png` into `output` and returns their paths."""
    matplotlib = require("matplotlib")
    matplotlib.use("Agg")
    return _loss_curve(arms, output / "loss.png"), _step_times(arms, output / "step_time.png")


def _loss_curve(arms: list[Arm], path: Path) -> Path:
    figure, axes = _axes("Training loss", "step", "cross-entropy per token, nats")
    # PEFT below as a broad line, ours on top as a thin one: where the curves agree, both stay visible.
    for arm in reversed(arms):
        ours = arm.name == OURS
        width = 1.6 if ours else 4.0
        steps = [record.step + 1 for record in arm.history]
        axes.plot(steps, arm.losses(), color=_color(arm), linewidth=width, alpha=1.0 if ours else 0.45, label=arm.name)
    return _save(figure, axes, path)


def _step_times(arms: list[Arm], path: Path) -> Path:
    figure, axes = _axes("Time per step", "step", "seconds")
    for arm in arms:
        timed = [record for record in arm.history if record.timed] or arm.history
        median = statistics.median(timed_seconds(arm))
        steps = [record.step + 1 for record in timed]
        axes.scatter(steps, [record.seconds for record in timed], s=14, color=_color(arm), alpha=0.55, linewidths=0)
        axes.axhline(median, color=_color(arm), linewidth=1.6, label=f"{arm.name}: median {median:.3f} s")
    axes.set_ylim(bottom=0)
    return _save(figure, axes, path)


def _color(arm: Arm) -> str:
    return _COLORS.get(arm.name, _OTHER)


def _axes(title: str, x_label: str, y_label: str):  # type: ignore[no-untyped-def]
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(7.2, 4.0), layout="constrained")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color="#1f2937")
    axes.set_xlabel(x_label, color="#4b5563")
    axes.set_ylabel(y_label, color="#4b5563")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors="#6b7280")
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#d1d5db")
    return figure, axes


def _save(figure, axes, path: Path) -> Path:  # type: ignore[no-untyped-def]
    from matplotlib import pyplot

    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)
    return path
