"""Where a test can run: the devices and backends of this machine, as pytest parameters.

A *place* is one (device, backend). Tests are generated for the places that exist, not skipped on those that do not;
`test_backends.py` holds the tests that fail when a backend that should be here is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch

from peft_kernels import backends

GPU = pytest.mark.gpu

LAYER_OPERATORS = ("lora_linear_forward", "lora_linear_backward")
"""What `lora_linear` calls; a backend serves the layer when it serves all of them."""

ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Place:
    """One backend on one device."""

    device: str
    backend: str

    @property
    def simulated(self) -> bool:
        """Whether CUDA kernels are executed on the CPU here, a thousand times slower than compiled code."""
        return self.backend == "cuda" and self.device == "cpu"

    def kernel(self, operator: str, dtype: torch.dtype) -> backends.Function:
        """The function that runs `operator` here, as `peft_kernels.ops` would call it."""
        return backends.kernel(operator, self.device, dtype, self.backend)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def devices() -> tuple[str, ...]:
    """The device types of this machine that the operators know."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def marks_of(device: str) -> tuple[pytest.MarkDecorator, ...]:
    """`gpu` for CUDA devices."""
    return (GPU,) if device == "cuda" else ()


def serves(place: Place, operators: Iterable[str], dtype: torch.dtype) -> bool:
    """Whether all `operators` run there with such tensors."""
    return all(backends.obstacle(name, place.backend, place.device, dtype) is None for name in operators)


def places(*operators: str, dtypes: Iterable[torch.dtype] = (torch.float32,)) -> list[object]:
    """pytest parameters `place`: everywhere that serves `operators` in one of `dtypes`."""
    return [
        pytest.param(place, id=f"{place.device}-{place.backend}", marks=marks_of(place.device))
        for place in _all_places()
        if any(serves(place, operators, dtype) for dtype in dtypes)
    ]


def places_and_dtypes(*operators: str, dtypes: Iterable[torch.dtype] = ALL_DTYPES) -> list[object]:
    """pytest parameters `(place, dtype)`: everywhere and everything that serves `operators`."""
    return [
        pytest.param(
            place, dtype, id=f"{place.device}-{place.backend}-{dtype_name(dtype)}", marks=marks_of(place.device)
        )
        for place in _all_places()
        for dtype in dtypes
        if serves(place, operators, dtype)
    ]


def operators_at_places(
    operators: Iterable[str], dtypes: Iterable[torch.dtype] = ALL_DTYPES, backend: str | None = None
) -> list[object]:
    """pytest parameters `(operator, place, dtype)`: every place, or those of one backend, that serves the operator."""
    dtypes = tuple(dtypes)
    return [
        pytest.param(operator, *param.values, id=f"{operator}-{param.id}", marks=param.marks)
        for operator in operators
        for param in places_and_dtypes(operator, dtypes=dtypes)
        if backend in (None, param.values[0].backend)
    ]


_NAMESPACES = {"cpu": "peft_kernels", "cuda": "peft_kernels", "triton": "peft_kernels_triton"}


def compiled_places(*operators: str) -> list[object]:
    """pytest parameters `(namespace, device)`: where all these raw operators are registered with the dispatcher."""
    return [
        pytest.param(
            "peft_kernels_simt" if place.simulated else _NAMESPACES[place.backend],
            place.device,
            id=f"{place.device}-{place.backend}",
            marks=marks_of(place.device),
        )
        for place in _all_places()
        if place.backend in _NAMESPACES and serves(place, operators, torch.float32)
    ]


def compiled_cases(cases: Iterable[tuple[str, *tuple[object, ...]]]) -> list[object]:
    """pytest parameters `(namespace, device, *case)`: each case, the operator's name first, where it is registered."""
    return [
        pytest.param(*place.values, *case, id=f"{place.id}-{case[0]}", marks=place.marks)
        for case in cases
        for place in compiled_places(case[0])
    ]


def _all_places() -> list[Place]:
    return [Place(device, backend) for device in devices() for backend in ("reference", "cpu", "triton", "cuda")]
