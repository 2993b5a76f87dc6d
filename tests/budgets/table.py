"""The table of budgets: a row of figures per kernel and architecture, the same for every part, in `budgets.json`.

`{part: {"compiler": ..., "kernels": {kernel: {architecture: row}}}}`, one line per row, so that a change of one kernel
shows as one line.
"""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from . import main_loop, occupancy
from .kernel import Kernel, Measurement, in_order

PATH = Path(__file__).with_name("budgets.json")

Row = dict[str, Any]
Table = dict[str, dict[str, Any]]

# Figures move a little with every change of the compiler's mind; these steps are what a change may cost unnoticed.
REGISTER_STEP, INSTRUCTION_STEP = 8, 100

WATCHED = {
    "UTCHMMA": ("UTCHMMA*", 1),  # tensor cores of Blackwell, Hopper and Ampere
    "HGMMA": ("HGMMA*", 1),
    "HMMA": ("HMMA*", 1),
    "FFMA": ("FFMA*", 33),  # a few scalar multiply-adds are no matrix product
    "LDSM": ("LDSM*", 1),
    "LDGSTS.128": ("LDGSTS*128*", 1),
    "LDG.128": ("LDG.*128*", 1),
    "STG.128": ("STG.*128*", 1),
    "LDS.128": ("LDS.*128*", 1),
    "STS.128": ("STS.*128*", 1),
}
"""Name to pattern and least number: the instructions that a row records, so that none is lost unnoticed."""


def row_of(kernel: Kernel, architecture: str) -> Row:
    """The figures of a kernel as a budget."""
    return {
        "registers": _up(kernel.registers, REGISTER_STEP),
        "stack": kernel.stack,
        "spills": kernel.count("LDL", "STL"),
        "static_shared": kernel.static_shared,
        "dynamic_shared": kernel.dynamic_shared,
        "threads": kernel.threads,
        "blocks": occupancy.blocks(kernel, architecture),
        "instructions": _up(kernel.opcodes.total(), INSTRUCTION_STEP),
        "intensity": main_loop.intensity(kernel.loop),
        "opcodes": [name for name, (pattern, least) in WATCHED.items() if occurrences(kernel, pattern) >= least],
    }


def occurrences(kernel: Kernel, pattern: str) -> int:
    """How often instructions occur that match a shell pattern."""
    return sum(count for opcode, count in kernel.opcodes.items() if fnmatchcase(opcode, pattern))


def part_of(measurement: Measurement) -> dict[str, Any]:
    """One part of the table: the compiler, and every kernel's rows."""
    kernels = {
        name: {architecture: row_of(found[architecture], architecture) for architecture in in_order(found)}
        for name, found in sorted(measurement.kernels.items())
    }
    return {"compiler": measurement.compiler, "kernels": kernels}


def load(path: Path = PATH) -> Table:
    """The committed table; empty where there is none yet."""
    table: Table = json.loads(path.read_text()) if path.exists() else {}
    return table


def save(table: Table, path: Path = PATH) -> None:
    """Writes the table, a row to a line."""
    parts = []
    for part, content in sorted(table.items()):
        kernels = [
            f"      {json.dumps(name)}: {{\n"
            + ",\n".join(f"        {json.dumps(arch)}: {json.dumps(row)}" for arch, row in rows.items())
            + "\n      }"
            for name, rows in content["kernels"].items()
        ]
        head = f'  {json.dumps(part)}: {{\n    "compiler": {json.dumps(content["compiler"])},\n    "kernels": {{\n'
        parts.append(head + ",\n".join(kernels) + "\n    }\n  }")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
