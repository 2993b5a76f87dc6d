"""A GPU that holds no values: whatever would have the host wait for one raises, as in the capture of a CUDA graph.

It is torch's "meta" device, whose tensors have shapes alone. Reading a value, or making a shape of values, raises there
by itself; copies between host and device raise here. Compiled operators are one function for every device, and have a
kernel for this one: their fake kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_kernels import backends

DEVICE = torch.device("meta")


class HostWaits(Exception):
    """An operator moves data between host and device."""


class _NoCopies(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        copied = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        # Elsewhere a 0-d tensor of the host is a number, which travels with the kernel's arguments.
        places = {tensor.device.type for tensor in tensors if copied or tensor.dim() > 0}
        if len(places) > 1:
            raise HostWaits(f"{function} copies between {' and '.join(sorted(places))}")
        return result


@contextmanager
def device_without_values(monkeypatch: pytest.MonkeyPatch, backend: str | None = None) -> Iterator[None]:
    """Within it operators take tensors on `DEVICE` for a GPU's.

    Args:
        monkeypatch: undoes it all.
        backend: "reference" for every operator; None for compiled operators, where they are built.
    """
    kernel = backends.kernel

    def of_any_device(operator: str, device_type: str, dtype: torch.dtype, asked: str | None = None) -> Any:
        return kernel(operator, "cpu" if device_type == DEVICE.type else device_type, dtype, asked)

    monkeypatch.setattr(backends, "kernel", of_any_device)
    monkeypatch.setattr(backends, "_forced", backend)
    with _NoCopies():
        yield


def valueless(module: nn.Module) -> nn.Module:
    """The module with parameters and buffers on `DEVICE`, of the same shapes and dtypes."""

    def moved(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)

    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(moved(parameter), parameter.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = moved(buffer)
    return module


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "int": lambda x: int(x.sum()),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).any()),
    "if": lambda x: 1 if (x > 0).all() else 2,
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "boolean index": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.int().flatten().bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x[:, 0].int(), 0),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "scalar to the host": lambda x: x.sum().cpu(),
    "copy_": lambda x: torch.empty(x.shape).copy_(x),
    "scalar from the host": lambda x: torch.tensor(1.0).to(x.device),
    "onto the device": lambda x: torch.empty_like(x).copy_(torch.ones(x.shape)),
    "numpy": lambda x: x.numpy(),
}
"""What has to raise there, so that a test which passes says something."""
