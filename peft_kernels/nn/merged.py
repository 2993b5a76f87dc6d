"""Keeping a sparse delta written into a weight: when to write it, how to take it out."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from .. import backends


def write_delta(weight: Tensor, indices: Tensor, original: Tensor, values: Tensor | None) -> None:
    """`weight[indices] = original + values`, rounded once; without values original itself, bit for bit.

    Autograd is told that weight changed: a backward pass that still needs what it held before raises.
    """
    write = backends.kernel("scatter_write_", weight.device.type, weight.dtype)
    write(weight.detach(), indices, original, None if values is None else values.detach())
    count_change(weight)


def count_change(tensor: Tensor) -> None:
    """Tells autograd that an operator has changed `tensor` in place."""
    if not torch.compiler.is_compiling() and not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def entries_of(weight: Tensor, indices: Tensor) -> Tensor:
    """`weight[indices]`, a new tensor `[nnz]`."""
    return weight.detach().view(-1)[indices.to(torch.int64)]


class Stamp:
    """Remembers which values a layer has written into its weight.

    Torch counts the in-place changes of every tensor, so the same tensors with the same counts mean that nothing has
    happened since. That holds for the weight that the layer was built around, its own; another one in its place has
    been gathered for the moment (FSDP), and is written to in every pass.
    """

    def __init__(self, weight: Tensor) -> None:
        self._own = weakref.ref(weight)
        self._written: tuple[int, Any, int] | None = None

    def owns(self, weight: Tensor) -> bool:
        """Whether weight is the layer's own."""
        return self._own() is weight

    def set(self, weight: Tensor, values: Tensor) -> None:
        """The present values are in weight now."""
        if self.owns(weight) and not weight.is_inference() and not values.is_inference():
            self._written = (weight._version, weakref.ref(values), values._version)

    def clear(self) -> None:
        """Nothing is known of what weight holds."""
        self._written = None

    def holds(self, weight: Tensor, values: Tensor) -> bool:
        """Whether weight holds the present values for certain."""
        if self._written is None or not self.owns(weight):
            return False
        weight_version, written, values_version = self._written
        return written() is values and weight._version == weight_version and values._version == values_version
