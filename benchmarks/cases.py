"""The loop that every benchmark shares: one record per case, saved as soon as it is there."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from .suites import (
    CallCase,
    DeltaCase,
    LayerCase,
    ModelCase,
    S2FTCase,
    S2FTModelCase,
    SparseCase,
    SparseModelCase,
    TokenCase,
    TokenModelCase,
)

Record = dict[str, Any]
AnyCase = (
    LayerCase
    | ModelCase
    | SparseCase
    | SparseModelCase
    | S2FTCase
    | S2FTModelCase
    | TokenCase
    | TokenModelCase
    | CallCase
    | DeltaCase
)
Case = TypeVar(
    "Case",
    LayerCase,
    ModelCase,
    SparseCase,
    SparseModelCase,
    S2FTCase,
    S2FTModelCase,
    TokenCase,
    TokenModelCase,
    CallCase,
    DeltaCase,
)


@dataclass(frozen=True)
class Progress:
    """What a benchmark tells whoever started it.

    Attributes:
        line: takes one line about a finished case.
        save: takes the results so far, so that a run that is cut off keeps what it has.
        remaining: seconds left; no case begins at or below zero.
    """

    line: Callable[[str], None]
    save: Callable[[Record], None]
    remaining: Callable[[], float]


def failure(error: BaseException) -> Record:
    """The record of something that raised; call it inside the `except` block."""
    reason = f"{type(error).__name__}: {error}"
    return {"status": "failed", "reason": reason, "traceback": traceback.format_exc()}


def described(case: AnyCase) -> Record:
    """A case in plain values, for JSON."""
    values = asdict(case)
    if "dtype" in values:
        values["dtype"] = str(values["dtype"]).removeprefix("torch.")
    return values


def run_cases(
    cases: Sequence[Case],
    measure: Callable[[Case], Record],
    describe: Callable[[Record], str],
    progress: Progress,
    train_info: Record,
) -> Record:
    """Measures `cases` into `train_info["cases"]`; one that fails is recorded as failed and costs the others nothing.

    Cases for which no time is left are listed under `not_reached`.
    """
    train_info.update(cases=[], not_reached=[])
    for case in cases:
        if progress.remaining() <= 0:
            train_info["not_reached"].append(described(case))
            continue
        try:
            record = {"case": described(case), **measure(case)}
            line = describe(record)
        except Exception as error:
            record = {"case": described(case), **failure(error)}
            line = f"{record['case']}: {record['reason']}"
        train_info["cases"].append(record)
        progress.line(line)
        progress.save(train_info)
    return train_info


def failures(train_info: Record) -> list[str]:
    """What failed or was wrong without stopping the benchmark, one line each. "Unavailable" is no failure."""
    found = []
    for record in train_info["cases"]:
        if record.get("status") == "failed":
            found.append(f"{record['case']}: {record['reason']}")
        for name, arm in record.get("arms", {}).items():
            for part in (arm, arm.get("memory", {})):
                if part.get("status") in ("failed", "wrong"):
                    found.append(f"{record['case']}: {name}: {part['status']}: {part['reason']}")
    return found
