"""Tables for people: the differences, and the figures as measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import families, table
from .comparison import Difference, said
from .kernel import Measurement


def differences(found: Iterable[Difference]) -> str:
    """Kernel, architecture, figure, budget, measured; `!` before what a test fails by.

    Architectures with the same to say share a line.
    """
    lines: dict[tuple[str, ...], list[str]] = {}
    for d in found:
        lines.setdefault(("!" if d.fault else "", d.kernel, d.figure, d.budget, d.measured), []).append(d.architecture)
    rows = [(mark, kernel, " ".join(where), *rest) for (mark, kernel, *rest), where in lines.items()]
    return columns(("", "kernel", "architecture", "figure", "budget", "measured"), rows)


def figures(part: str, measurement: Measurement, only: str = "") -> str:
    """Every kernel as measured, not rounded up, with the promise beside the intensity and the loop that it is of."""
    rows = []
    for name, kernels in sorted(measurement.kernels.items()):
        for architecture in table.in_order(kernels if only in name else ()):
            kernel = kernels[architecture]
            row = table.row_of(kernel, architecture)
            loop = {stem: sum(n for op, n in kernel.loop.items() if op.split(".")[0] == stem) for stem in _LOOP}
            figures = (kernel.registers, kernel.shared, kernel.threads, row["blocks"], kernel.opcodes.total())
            intensity = (row["intensity"], families.promised(part, name, architecture) or None)
            text = " ".join(f"{count} {stem}" for stem, count in loop.items() if count)
            rows.append((name, architecture, *map(said, (*figures, *intensity)), text))
    return columns(_HEADINGS, rows)


_LOOP = ("HMMA", "LDSM", "LDS", "LDGSTS")
_HEADINGS = (
    *("kernel", "architecture", "registers", "shared", "threads", "blocks", "instructions"),
    *("intensity", "promised", "main loop"),
)


def columns(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under their headings; empty without rows."""
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [headings, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
