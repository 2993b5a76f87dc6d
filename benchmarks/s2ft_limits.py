"""What an operation on a slice of channels must move or compute at least.

With M tokens, weight [N, K], s channels, e bytes per activation or weight, and float32 slices and gradients:

    gradient   2 M N s operations for input channels, 2 M s K for output channels; the dense one 2 M N K. So it is at
               best K / s or N / s times faster. Bytes: one read of dy and of the lines of x with channels in them, the
               gathered columns written and read, the gradient written; output channels: one read of x and of the lines
               of dy with channels in them, the gradient written
    adamw      the slice and both moments read and written, the gradient read: 28 bytes an element; the lines of weight
               with channels in them read and written
    swiglu     forward reads gate and up, writes h and its s columns; backward reads dh, gate and up, writes dgate and
               dup
    layer      the frozen linear's 4 M N K operations, forward and dx, and those of the gradient
    switch     the lines with channels in them read and written twice, for the adapter that goes and for the one that
               comes; both originals, and the change in float32, read or written once. Merging LoRA reads and writes
               the whole weight, and so does taking it out again

A line is 64 bytes. Random columns have few lines to themselves: at 3% of bfloat16 columns 62% of the lines hold one.
"""

from __future__ import annotations

from typing import Any

from .suites import S2FTCase

DENSE = "dense gradient"
FROZEN = "frozen linear"
_LINE = 64


def lines(case: S2FTCase, rows: int, columns: int, along_rows: bool) -> float:
    """Lines of a matrix `[rows, columns]` in the case's dtype that hold one of `case.channels` random channels,
    expected: whole rows or columns."""
    per_line = _LINE // case.dtype.itemsize
    if along_rows:
        return case.channels * columns / per_line
    return rows * columns / per_line * (1.0 - (1.0 - case.channels / columns) ** per_line)


def limits(case: S2FTCase) -> dict[str, Any]:
    """The limits as they go into a result file; `times_faster` by the arm that ours is compared with."""
    M, K, N, s, size = case.M, case.K, case.N, case.channels, case.dtype.itemsize
    of_input = case.dim == "input"
    elements = N * s if of_input else s * K
    weight_lines = lines(case, N, K, along_rows=not of_input)
    if case.operation == "gradient":
        if of_input:
            moved = M * N * size + _LINE * lines(case, M, K, False) + 2 * M * s * size
        else:
            moved = M * K * size + _LINE * lines(case, M, N, False)
        return {
            "bytes": moved + 4 * elements,
            "operations": 2 * M * elements,
            "operations_of_dense": 2 * M * N * K,
            "times_faster": {DENSE: N * K / elements},
        }
    if case.operation == "adamw":
        return {"bytes": 28 * elements + 8 * s + 2 * _LINE * weight_lines}
    if case.operation == "swiglu":
        return {"bytes": (8 * M * K + M * s) * size}
    if case.operation == "layer":
        frozen, added = 4 * M * N * K, 2 * M * elements
        return {"operations": frozen + added, "times_faster": {FROZEN: frozen / (frozen + added)}}
    one = 4 * _LINE * weight_lines + elements * (2 * size + 4)
    return {"bytes": case.layers * one, "bytes_of_merging": case.layers * 4 * N * K * size}
