"""Which backend serves which operator while something is measured, and on a GPU which one is to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from peft_kernels import backends


@contextmanager
def served() -> Iterator[dict[str, str]]:
    """Notes the backend of each operator that the enclosed code asks for; backward, too, where it runs within.

    Of an operator that several backends served, the last one stands.
    """
    found: dict[str, str] = {}
    original = backends.kernel

    def kernel(operator: str, device_type: str, dtype: torch.dtype, backend: str | None = None) -> Any:
        function = original(operator, device_type, dtype, backend)
        named = backend or backends.forced_backend()
        found[operator] = backends.choice(operator, device_type, dtype)[0] if named is None else named
        return function

    setattr(backends, "kernel", kernel)  # noqa: B010  (mypy refuses the assignment)
    try:
        yield found
    finally:
        setattr(backends, "kernel", original)  # noqa: B010


@contextmanager
def as_if_recorded(device_type: str) -> Iterator[None]:
    """On a GPU, chooses backends as if the record said that every kernel has run on its architecture.

    A kernel is no default before that, so that without this, the first measurements on a GPU would be of the
    reference. What is measured is compared with something else first, by each benchmark. On the CPU nothing changes.
    """
    if device_type != "cuda":
        yield
        return
    runs = [{"architecture": "sm_{}{}".format(*torch.cuda.get_device_capability())}]
    everything = {operator: {"cuda": runs, "triton": runs} for operator in backends.operators()}
    before = backends._recorded()
    _use(everything)
    try:
        yield
    finally:
        _use(before)


def _use(record: dict[str, dict[str, list[dict[str, str]]]]) -> None:
    backends._record = record
    backends._table.clear()  # choices made by the other record
