"""Measured figures against the table and the promises: what differs, and which of it is a fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import families, occupancy, table
from .kernel import Measurement
from .table import Row


@dataclass(frozen=True)
class Difference:
    """One line for a reader. `fault` says that a test fails by it; anything else is news for `update`."""

    kernel: str
    architecture: str
    figure: str
    budget: str
    measured: str
    fault: bool = True


def _more(budget: Any, measured: Any) -> bool:
    return (measured or 0) > (budget or 0)


def _less(budget: Any, measured: Any) -> bool:
    return (measured or 0) < (budget or 0)


def _other(budget: Any, measured: Any) -> bool:
    return bool(measured != budget)


def _lost(budget: Any, measured: Any) -> bool:
    return not set(budget or ()) <= set(measured)


WORSE: dict[str, Callable[[Any, Any], bool]] = {
    "registers": _more,
    "stack": _more,
    "spills": _more,
    "static_shared": _more,
    "dynamic_shared": _more,
    "threads": _other,
    "blocks": _less,
    "instructions": _more,
    "intensity": _less,
    "opcodes": _lost,
}
"""Figure of a row to when a measured one is beyond its budget."""

OF_ONE_RELEASE = {"cuda": {"registers", "instructions", "opcodes"}, "triton": set(WORSE)}
"""What two releases of a compiler do differently. All that Triton's figures follow from is its own choice."""


def differences(part: str, measurement: Measurement, budgets: dict[str, Any]) -> list[Difference]:
    """Every figure that is not its budget's, each kernel without a row, and each row without a kernel.

    Architectures that were not built, and figures of another release of the compiler, are left out; `reservations()`
    says so.
    """
    rows, built = budgets.get("kernels", {}), set(measurement.architectures)
    left_out = OF_ONE_RELEASE[part] if _released_otherwise(measurement, budgets) else set()
    found = []
    for name in sorted({*rows, *measurement.kernels}):
        budgeted, kernels = rows.get(name, {}), measurement.kernels.get(name, {})
        for architecture in table.in_order({*budgeted, *kernels} & built):
            if architecture not in kernels:
                found.append(Difference(name, architecture, "kernel", "a row", "none"))
            elif architecture not in budgeted:
                found.append(Difference(name, architecture, "kernel", "none", "new"))
            else:
                measured = table.row_of(kernels[architecture], architecture)
                found += _of_rows(name, architecture, budgeted[architecture], measured, left_out)
    return found


def _of_rows(name: str, architecture: str, budget: Row, measured: Row, left_out: set[str]) -> Iterator[Difference]:
    for figure, worse in WORSE.items():
        was, now = budget.get(figure), measured[figure]
        if figure not in left_out and was != now:
            yield Difference(name, architecture, figure, said(was), said(now), worse(was, now))


def faults(part: str, measurement: Measurement) -> list[Difference]:
    """What no budget can allow: local memory, blocks that do not fit, broken promises."""
    found = []
    for name, kernels in sorted(measurement.kernels.items()):
        for architecture, kernel in kernels.items():
            row, limits = table.row_of(kernel, architecture), occupancy.multiprocessor(architecture)
            lines = list(families.families_of(part, name, architecture))

            def add(figure: str, budget: object, measured: object, at: tuple[str, str] = (name, architecture)) -> None:
                found.append(Difference(*at, figure, said(budget), said(measured)))

            for figure in ("stack", "spills"):
                if row[figure]:
                    add(figure, 0, row[figure])
            if limits is not None and kernel.shared > limits.block_shared:
                add("shared", limits.block_shared, kernel.shared)
            if part == "cuda" and not lines:
                add("family", "a line in families.py", None)
            if part == "cuda" and kernel.threads is None:
                add("threads", "__launch_bounds__", None)
            if kernel.shared == 0 and kernel.count("LDS", "STS", "LDSM", "LDGSTS", "ATOMS"):
                add("dynamic_shared", "bytes in families.py", 0)
            for family, _ in lines:
                for pattern in family.opcodes:
                    if not table.occurrences(kernel, pattern):
                        add("opcodes", pattern, None)
                if _less(family.blocks, row["blocks"]):
                    add("blocks", f"{family.blocks} promised", row["blocks"])
            if _less(promise := families.promised(part, name, architecture), row["intensity"]):
                add("intensity", f"{promise} promised", row["intensity"])
    return found


def all_differences(part: str, measurement: Measurement, budgets: dict[str, Any]) -> list[Difference]:
    """Both of the above, each once, kernel by kernel."""
    found = dict.fromkeys([*differences(part, measurement, budgets), *faults(part, measurement)])
    return sorted(found, key=lambda difference: difference.kernel)


def reservations(part: str, measurement: Measurement, budgets: dict[str, Any]) -> list[str]:
    """What was not compared, and why."""
    notes = list(measurement.notes)
    budgeted = {architecture for rows in budgets.get("kernels", {}).values() for architecture in rows}
    if lacking := table.in_order(budgeted - set(measurement.architectures)):
        notes.append(f"not in this build, not compared: {', '.join(lacking)}")
    if _released_otherwise(measurement, budgets):
        notes.append(
            f"the budgets are of {budgets['compiler']}, this is {measurement.compiler}; not compared: "
            + ", ".join(figure for figure in WORSE if figure in OF_ONE_RELEASE[part])
        )
    return notes


def _released_otherwise(measurement: Measurement, budgets: dict[str, Any]) -> bool:
    return bool(budgets.get("compiler", measurement.compiler) != measurement.compiler)


def said(figure: object) -> str:
    """A figure in a table for people."""
    if isinstance(figure, list):
        return " ".join(figure) or "none"
    return "none" if figure is None else str(figure)
