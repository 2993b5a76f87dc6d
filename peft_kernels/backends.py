"""Which backend serves which operator on which device, and why.

Every operator has up to four backends: `cuda` and `cpu` (compiled, registered with the dispatcher under
`torch.ops.peft_kernels`), `triton` (same schemas under `torch.ops.peft_kernels_triton`) and `reference` (plain
PyTorch). A family registers its functions here; `kernel(...)` picks one per call from a table that is made once per
(operator, device type, dtype). The default is the first backend of the device's preference list that is *known
correct* there, which `backend_status.json` records: a kernel that no GPU has run yet is never a default.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Function = Callable[..., Any]

BACKENDS = ("cuda", "triton", "cpu", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_STATUS_FILE = Path(__file__).with_name("backend_status.json")


@dataclass(frozen=True)
class Registration:
    """One operator on one backend.

    Attributes:
        function: the callable, or None where the backend is not available on this machine.
        device_types: device types it can run on.
        dtypes: activation dtypes it takes.
        reason: why `function` is None, else None.
    """

    function: Function | None
    device_types: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    reason: str | None = None


_registrations: dict[str, dict[str, Registration]] = {}
_table: dict[tuple[str, str, torch.dtype, str | None], Function] = {}
_forced: str | None = None


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot serve the operator here; the message says why."""


def register(operator: str, backend: str, registration: Registration) -> None:
    """Makes `backend` known as a way to run `operator`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    _registrations.setdefault(operator, {})[backend] = registration
    _table.clear()


def operators() -> tuple[str, ...]:
    """The names of all registered operators."""
    return tuple(_registrations)


def recorded_runs(operator: str, backend: str) -> list[dict[str, str]]:
    """The GPUs on which this kernel's tests have passed, from the committed record; empty when none has."""
    return _recorded().get(operator, {}).get(backend, [])


def _recorded() -> dict[str, dict[str, list[dict[str, str]]]]:
    global _record
    if _record is None:
        _record = json.loads(_STATUS_FILE.read_text())["verified_on"]
    return _record


_record: dict[str, dict[str, list[dict[str, str]]]] | None = None


def obstacle(operator: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run `operator` on such tensors here; None when it can."""
    registration = _registrations[operator].get(backend)
    if registration is None:
        return f"{operator} has no {backend} kernel"
    if device_type not in registration.device_types:
        return f"serves {' and '.join(registration.device_types)} tensors only"
    if dtype not in registration.dtypes:
        return f"does not take {str(dtype).removeprefix('torch.')}"
    return registration.reason


def _default_obstacle(operator: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `backend` is not the default; beyond `obstacle`, a GPU kernel must have run on this architecture."""
    reason = obstacle(operator, backend, device_type, dtype)
    if reason is not None or device_type != "cuda" or backend == "reference":
        return reason
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if any(run["architecture"] == architecture for run in recorded_runs(operator, backend)):
        return None
    return f"{_TRIED[backend]}, not yet run on a GPU of {architecture}"


_TRIED = {"cuda": "compiled, executed on the CPU by its tests", "triton": "compiled, interpreted by its tests"}


def choice(operator: str, device_type: str, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """The default backend for such tensors and, for each preferred one that was passed over, why."""
    passed_over: dict[str, str] = {}
    for backend in _PREFERENCE.get(device_type, ("reference",)):
        reason = _default_obstacle(operator, backend, device_type, dtype)
        if reason is None:
            return backend, passed_over
        passed_over[backend] = reason
    raise BackendUnavailable(
        f"{operator}: no backend for {dtype} on {device_type}: "
        + "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    )


def _resolve(operator: str, device_type: str, dtype: torch.dtype, backend: str | None) -> Function:
    if backend is None:
        backend = choice(operator, device_type, dtype)[0]
    else:
        reason = obstacle(operator, backend, device_type, dtype)
        if reason is not None:
            raise BackendUnavailable(f"{operator}: backend {backend!r} was asked for, but it {reason}")
    function = _registrations[operator][backend].function
    assert function is not None
    return function


def kernel(operator: str, device_type: str, dtype: torch.dtype, backend: str | None = None) -> Function:
    """The function that serves `operator`; `backend` overrides both `use_backend` and the default."""
    key = (operator, device_type, dtype, backend or _forced)
    function = _table.get(key)
    if function is None:
        function = _resolve(*key)
        if not torch.compiler.is_compiling():  # a traced function must not write to what lies outside it
            _table[key] = function
    return function


def forced_backend() -> str | None:
    """The backend named by the enclosing `use_backend`, or None."""
    return _forced


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Runs every operator of the enclosed code on one backend, or raises `BackendUnavailable` with the reason.

    The choice is made in forward and holds for that call's backward, wherever it runs. It applies to the whole
    process, not to one thread.

    Args:
        backend: `"cuda"`, `"triton"`, `"cpu"` or `"reference"`.
    """
    global _forced
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    previous, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = previous


@dataclass(frozen=True)
class ReportRow:
    """One line of `backend_report()`."""

    operator: str
    device_type: str
    dtype: torch.dtype
    backend: str
    passed_over: dict[str, str]


@dataclass(frozen=True)
class BackendReport:
    """For every operator, device type and dtype of this machine: the backend that serves it, and why others do not."""

    rows: tuple[ReportRow, ...]

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            others = "; ".join(f"{name}: {reason}" for name, reason in row.passed_over.items())
            name = str(row.dtype).removeprefix("torch.")
            lines.append(f"{row.operator:<20} {row.device_type:<5} {name:<9} {row.backend:<10} {others}".rstrip())
        return "\n".join(lines)


def backend_report() -> BackendReport:
    """Which backend serves each operator here, and for each that does not, the reason."""
    device_types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = []
    for operator in operators():
        for device_type in device_types:
            for dtype in DTYPES:
                backend, passed_over = choice(operator, device_type, dtype)
                others = dict(passed_over)
                for other in BACKENDS:
                    if other != backend and other not in others:
                        reason = obstacle(operator, other, device_type, dtype)
                        others[other] = reason or "available, less preferred"
                rows.append(ReportRow(operator, device_type, dtype, backend, others))
    return BackendReport(tuple(rows))
