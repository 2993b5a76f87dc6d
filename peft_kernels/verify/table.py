"""Prints the outcomes of `verify` as a table: one line per operator, backend and device, one column per dtype."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from ..backends import DTYPES
from .check import Outcome

_EXPLANATION = (
    "Numbers: the largest error as a share of the allowed one, which is twice PyTorch's own error in that dtype; "
    "0.00: the same bits, or nothing to round. -: does not run here."
)


def print_outcomes(outcomes: list[Outcome], console: Console) -> None:
    """Prints the table, the failures with their first failing case, and a verdict."""
    table = Table(title="Operators against the reference in float64", box=box.SIMPLE_HEAD, pad_edge=False)
    table.title_justify, table.title_style = "left", "bold"
    table.padding = (0, 0, 0, 1)  # whole names in 80 columns
    for column in ("operator", "backend", "device"):
        table.add_column(column, no_wrap=True)
    for dtype in DTYPES:
        table.add_column(_name(dtype), justify="right", no_wrap=True)
    lines: dict[tuple[str, str, str], dict[object, Outcome]] = {}
    for outcome in outcomes:
        lines.setdefault((outcome.operator, outcome.backend, outcome.device_type), {})[outcome.dtype] = outcome
    for heads, by_dtype in lines.items():
        table.add_row(*heads, *(_cell(by_dtype.get(dtype)) for dtype in DTYPES))
    console.print(table)
    console.print(_EXPLANATION, style="dim", highlight=False)
    failed = [outcome for outcome in outcomes if not outcome.passed]
    for outcome in failed:
        where = f"{outcome.operator}, {outcome.backend} on {outcome.device_type}, {_name(outcome.dtype)}"
        console.print(f"FAILED {where}: {outcome.failure}", style="red", highlight=False, markup=False, soft_wrap=True)
    cases = sum(outcome.cases for outcome in outcomes)
    verdict = f"{len(failed)} of {len(outcomes)} checks failed" if failed else f"all {len(outcomes)} checks passed"
    console.print(f"{verdict} ({cases} operator calls).", highlight=False)


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return "[dim]-[/]"
    return f"[green]{outcome.worst:.2f}[/]" if outcome.passed else "[red]FAILED[/]"


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
