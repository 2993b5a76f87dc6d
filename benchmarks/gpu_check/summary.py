"""What a check found, as JSON for programs and as Markdown for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import results
from .steps import NOT_PERMITTED, NOT_RUN, PASSED, Step


@dataclass
class Summary:
    """Everything that is known so far.

    Attributes:
        environment: GPU, architecture, date, commit, packages.
        verified: {operator, backend} that kept the accuracy rule in every case.
        kernels: {kernel, backend, operators, launches, microseconds, ran}, the figures from the operators' cases; those
            of the library that neither they nor the sanitizer's tests ran have `ran` false.
        sanitizer: `kernels`, those that its tests run, and `tools`, per tool {errors, tests}.
        slowest: {kernel, launches, microseconds} of one forward and backward of a layer.
        counters: one entry per launch of the slowest kernels.
    """

    environment: dict[str, Any]
    steps: list[Step] = field(default_factory=list)
    verified: list[dict[str, str]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    sanitizer: dict[str, Any] = field(default_factory=dict)
    slowest: list[dict[str, Any]] = field(default_factory=list)
    counters: list[dict[str, Any]] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing that could run went wrong."""
        return all(step.status in (PASSED, NOT_RUN, NOT_PERMITTED) for step in self.steps)

    def add(self, *steps: Step) -> None:
        """Takes in steps that have ended, and says so."""
        self.steps += steps
        for step in steps:
            print(step, flush=True)

    def write(self, output: Path) -> None:
        """Writes summary.json and summary.md."""
        results.write_atomically(output / "summary.json", json.dumps(asdict(self), indent=1) + "\n")
        results.write_atomically(output / "summary.md", self.markdown())

    def markdown(self) -> str:
        """The steps, the kernels that ran and how they did."""
        environment = self.environment
        lines = [f"# GPU check on {environment['gpu']} ({environment['architecture']}), {environment['date']}", ""]
        lines += _table(("step", "outcome", "seconds", ""), [(s.name, s.status, s.seconds, s.note) for s in self.steps])
        if self.kernels:
            lines += ["", "Kernels:", "", *_table(("backend", "kernel", "ran", "in", "us"), self._kernel_rows())]
        if self.slowest:
            rows = [(row["kernel"], row["launches"], row["microseconds"]) for row in self.slowest]
            lines += ["", "One forward and backward of a layer:", "", *_table(("kernel", "launches", "us"), rows)]
        if self.counters:
            heads = tuple(dict.fromkeys(key for row in self.counters for key in row))
            cells = [tuple(_figure(row.get(head)) for head in heads) for row in self.counters]
            lines += ["", "Counters of its launches:", "", *_table(heads, cells)]
        return "\n".join(lines) + "\n"

    def _kernel_rows(self) -> list[tuple[object, ...]]:
        return [
            (
                *(kernel["backend"], kernel["kernel"], "yes" if kernel["ran"] else "no"),
                *(", ".join(kernel["operators"]) or "-", kernel["microseconds"]),
            )
            for kernel in self.kernels
        ]


def _table(heads: Sequence[str], rows: Sequence[tuple[object, ...]]) -> list[str]:
    cells: list[Sequence[object]] = [heads, ("---",) * len(heads), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells]


def _figure(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else value
