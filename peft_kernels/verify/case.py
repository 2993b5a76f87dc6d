"""One call of an operator on given inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Arguments of one operator call, in the order of its schema, on the CPU.

    Attributes:
        name: shapes and what is special, for messages.
        arguments: tensors, numbers, dtypes and None.
        mutated: positions of the arguments that the operator writes to; none when it returns its results.
        plain: the operator as plain PyTorch would compute it in the activations' dtype, where that rounds between its
            steps; None where the reference is that.
    """

    name: str
    arguments: tuple[Any, ...]
    mutated: tuple[int, ...] = ()
    plain: Callable[..., Any] | None = None

    def on(self, device_type: str) -> Case:
        """The same call on a device; strides are kept."""
        return self._map(lambda tensor: tensor.to(device_type))

    def in_float64(self) -> Case:
        """The same call with every floating point tensor, and every dtype asked for, in float64."""
        raised = self._map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        return replace(
            raised,
            arguments=tuple(torch.float64 if isinstance(v, torch.dtype) else v for v in raised.arguments),
        )

    def rounded_to(self, dtype: torch.dtype) -> Case:
        """The same call on the numbers that are left when every input passes through `dtype`."""
        return self._map(lambda tensor: tensor.to(dtype).to(tensor.dtype) if tensor.is_floating_point() else tensor)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Case:
        def mapped(value: Any) -> Any:
            if isinstance(value, list):
                return [mapped(item) for item in value]
            return function(value) if isinstance(value, Tensor) else value

        return replace(self, arguments=tuple(mapped(value) for value in self.arguments))
