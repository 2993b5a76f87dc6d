"""Budgets of the GPU kernels: what a compiler may make of them, in `budgets.json`.

python -m tests.budgets [cuda|triton]          how the kernels differ from their budgets; fails by what is worse
python -m tests.budgets update [cuda|triton]   makes the measured figures the budgets, and prints what changed
python -m tests.budgets show [cuda|triton]     all figures as measured, with what the main loops consist of

CUDA kernels are read from the library of the build, so build first; Triton's are compiled here. An update refuses what
no budget allows: local memory, broken promises of `families.py`. Look at what changed before you commit it: a budget
that grew needs a reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from . import comparison, cuda_library, report, table
from .kernel import CannotMeasure, Measurement


def measure_triton() -> Measurement:
    """Imports Triton only here: CUDA kernels have budgets without it."""
    try:
        from . import triton_offline
    except ImportError as missing:
        raise CannotMeasure("needs triton") from missing
    return triton_offline.measure()


PARTS: dict[str, Callable[[], Measurement]] = {"cuda": cuda_library.measure, "triton": measure_triton}


def check(part: str, measurement: Measurement, budgets: table.Table) -> bool:
    """Prints every difference; true without a fault among them."""
    content = budgets.get(part, {})
    found = comparison.all_differences(part, measurement, content)
    notes = comparison.reservations(part, measurement, content)
    print(f"{part}: {len(measurement.kernels)} kernels, {measurement.compiler}", *notes, sep="\n  ")
    print(report.differences(found) or "  all as budgeted")
    return not any(difference.fault for difference in found)


def update(part: str, measurement: Measurement, budgets: table.Table, path: Path = table.PATH) -> bool:
    """Prints what changes and writes it, unless a promise is broken or the build is not a whole one."""
    check(part, measurement, budgets)
    if broken := comparison.faults(part, measurement):
        print(f"{part}: not written, for no budget allows this:\n{report.differences(broken)}")
        return False
    rows = budgets.get(part, {}).get("kernels", {}).values()
    if lacking := {architecture for row in rows for architecture in row} - set(measurement.architectures):
        print(f"{part}: not written, for this build lacks {', '.join(table.in_order(lacking))}")
        return False
    budgets[part] = table.part_of(measurement)
    table.save(budgets, path)
    print(f"{part}: written")
    return True


def show(part: str, measurement: Measurement, budgets: table.Table) -> bool:
    """Prints all figures."""
    print(report.figures(part, measurement))
    return True


ACTIONS = {"check": check, "update": update, "show": show}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.budgets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="action or part", help=", ".join((*ACTIONS, *PARTS)))
    words = parser.parse_args().words
    if unknown := [word for word in words if word not in ACTIONS and word not in PARTS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join((*ACTIONS, *PARTS))}")
    actions = [word for word in words if word in ACTIONS] or ["check"]
    good, budgets = True, table.load()
    for part in [word for word in words if word in PARTS] or PARTS:
        try:
            measurement = PARTS[part]()
        except CannotMeasure as missing:
            print(f"{part}: {missing}")
            good = False
            continue
        good = all([ACTIONS[action](part, measurement, budgets) for action in actions]) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
