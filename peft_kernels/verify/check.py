"""Runs the cases of every family and applies the accuracy rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends
from . import (
    cross_entropy,
    deltas,
    lora,
    s2ft,
    sparse_delta,
    sparse_selection,
    token_elimination,
    token_selection,
    wta_crs,
)
from .case import Case

FAMILIES = (
    lora,
    s2ft,
    sparse_delta,
    sparse_selection,
    token_elimination,
    token_selection,
    cross_entropy,
    deltas,
    wta_crs,
)
"""Modules that supply inputs: `OPERATORS`, names, and `cases(operator, dtype)`."""

_Cases = Callable[[str, torch.dtype], Iterable[Case]]
# Sums may be formed in another order than the reference's, which in small tensors can be lucky; and there is nothing
# more exact than float64 to compare with.
_UNITS = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}


@dataclass(frozen=True)
class Outcome:
    """One (operator, backend, device type, dtype).

    Attributes:
        cases: number of inputs it was run on.
        worst: largest error of all cases as a share of the allowed one; above 1 it fails. 0 for exact results.
        failure: the first case that failed and how; None when all passed.
    """

    operator: str
    backend: str
    device_type: str
    dtype: torch.dtype
    cases: int
    worst: float
    failure: str | None

    @property
    def passed(self) -> bool:
        """Whether every case kept the rule."""
        return self.failure is None


def verify() -> Iterator[Outcome]:
    """Checks everything that can run here, one outcome at a time, in a fixed order."""
    device_types = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for operator in backends.operators():
        cases = _cases_of(operator)
        for device_type in device_types:
            for dtype in backends.DTYPES:
                able = [
                    backend
                    for backend in backends.BACKENDS
                    if backends.obstacle(operator, backend, device_type, dtype) is None
                ]
                yield from _check_backends(operator, cases, able, device_type, dtype)


def _cases_of(operator: str) -> _Cases | None:
    return next((family.cases for family in FAMILIES if operator in family.OPERATORS), None)


def _check_backends(
    operator: str,
    cases: _Cases | None,
    able: list[str],
    device_type: str,
    dtype: torch.dtype,
) -> Iterator[Outcome]:
    if cases is None:
        for backend in able:
            yield Outcome(operator, backend, device_type, dtype, 0, 0.0, "no family supplies inputs for it")
        return
    kernels = {backend: backends.kernel(operator, device_type, dtype, backend) for backend in able}
    reference = backends.kernel(operator, device_type, dtype, "reference")
    worst = dict.fromkeys(able, 0.0)
    failures: dict[str, str] = {}
    count = 0
    # PyTorch's own error in a dtype: its formula on inputs rounded to it, as a kernel may cast factors on load.
    for case in cases(operator, dtype):
        count += 1
        placed = case.on(device_type)
        exact = _run(reference, case.in_float64())
        own = _run(case.plain or reference, placed.rounded_to(dtype))
        for backend, kernel in kernels.items():
            if backend in failures:
                continue
            try:
                share = _error_share(_run(kernel, placed), own, exact)
            except Exception as error:  # whatever a broken kernel raises is a finding, not the end of the check
                share, failures[backend] = float("inf"), f"{case.name}: {type(error).__name__}: {error}"
            worst[backend] = max(worst[backend], share)
            if not share <= 1.0 and backend not in failures:
                failures[backend] = f"{case.name}: error is {share:.3g} times the allowed one"
    for backend in able:
        yield Outcome(operator, backend, device_type, dtype, count, worst[backend], failures.get(backend))


def _run(kernel: Callable[..., Any], case: Case) -> tuple[Tensor, ...]:
    arguments = [value.clone() if index in case.mutated else value for index, value in enumerate(case.arguments)]
    result = kernel(*arguments)
    changed = tuple(arguments[index] for index in case.mutated)
    if result is None:
        return changed
    return changed + (result if isinstance(result, tuple) else (result,))


def _error_share(actual: tuple[Tensor, ...], own: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The largest error of a call's results as a share of the allowed one; infinite for wrong shapes or dtypes."""
    if len(actual) != len(own):
        return float("inf")
    return max(_share(*tensors) for tensors in zip(actual, own, exact, strict=True))


def _share(actual: Tensor, own: Tensor, exact: Tensor) -> float:
    if actual.shape != own.shape or actual.dtype != own.dtype:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    if not actual.dtype.is_floating_point:
        return 0.0 if torch.equal(actual, own) else float("inf")
    exact = exact.double().cpu()
    ours, theirs = actual.double().cpu() - exact, own.double().cpu() - exact
    unit = torch.finfo(actual.dtype).eps * _UNITS[actual.dtype]
    measures = (_root_mean_square, _largest)
    return max(_quotient(measure(ours), 2 * measure(theirs) + unit * measure(exact)) for measure in measures)


def _quotient(error: float, allowed: float) -> float:
    if error == 0.0:
        return 0.0
    # NaN compares false with everything, and must not pass.
    return error / allowed if allowed > 0.0 and error == error else float("inf")


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
