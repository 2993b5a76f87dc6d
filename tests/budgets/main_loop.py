"""Where a tensor-core kernel spends its time, found in its machine code, and how much it multiplies per byte it loads.

A warp multiplies fragments that it first loads from shared memory. Per step of depth k, a warp with WM x WN elements of
the result does WM WN k multiply-adds on (WM + WN) k elements; the larger its tile, the less shared memory holds it up.
Counting the instructions of the innermost loop shows whether the compiled code keeps to that.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

LANES = 32
_MATRIX = re.compile(r"HMMA\.168(\d+)\.")  # 16 x 8 x k
_FRAGMENT_LOAD = re.compile(r"LDSM\.16\.MT?88(?:\.([24]))?$")
_LOAD = re.compile(r"LDS(?:\.[A-Z]+)*?(?:\.[US]?(8|16|64|128))?$")


class Instruction(NamedTuple):
    """One machine instruction; `target` is where a branch goes."""

    address: int
    opcode: str
    target: int | None = None


def main_loop(instructions: list[Instruction]) -> Counter[str]:
    """The opcodes of the innermost loop around matrix instructions; of several, of the one with the most.

    A loop is what lies between a branch backwards and its target. Without one, all of the kernel; empty without matrix
    instructions.
    """
    places = [instruction.address for instruction in instructions if _MATRIX.match(instruction.opcode)]
    if not places:
        return Counter()
    loops = set()
    for instruction in instructions:
        begin, end = instruction.target, instruction.address
        if begin is not None and begin <= end and (products := sum(begin <= place <= end for place in places)):
            loops.add((products, begin, end))
    innermost = [
        loop
        for loop in loops
        if not any(other != loop and loop[1] <= other[1] and other[2] <= loop[2] for other in loops)
    ]
    _, begin, end = max(innermost, default=(0, instructions[0].address, instructions[-1].address))
    return Counter(instruction.opcode for instruction in instructions if begin <= instruction.address <= end)


def multiply_adds(opcode: str) -> int:
    """Multiply-adds of one instruction of a warp."""
    found = _MATRIX.match(opcode)
    return 16 * 8 * int(found.group(1)) if found else 0


def bytes_loaded(opcode: str) -> int:
    """Bytes that the lanes of a warp receive from shared memory by one instruction."""
    if found := _FRAGMENT_LOAD.match(opcode):
        return int(found.group(1) or 1) * 8 * 8 * 2
    if found := _LOAD.match(opcode):
        return LANES * int(found.group(1) or 32) // 8
    return 0


def intensity(loop: Counter[str]) -> float | None:
    """Multiply-adds per byte loaded from shared memory; None without matrix instructions or without loads."""
    work = sum(count * multiply_adds(opcode) for opcode, count in loop.items())
    loaded = sum(count * bytes_loaded(opcode) for opcode, count in loop.items())
    return round(work / loaded, 2) if work and loaded else None


def tile_intensity(rows: int, columns: int, element_bytes: int = 2) -> float:
    """The figure that a warp tile of this size promises."""
    return round(rows * columns / (element_bytes * (rows + columns)), 2)
