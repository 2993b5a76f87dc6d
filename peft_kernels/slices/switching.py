"""Adapters switched in place: a few channels of each weight are written, the others are not touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import backends
from ..nn.linear import is_transposed, weight_obstacle
from ..nn.merged import put
from ..nn.merged_linear import contiguity_obstacle
from ..planning import memory_of, unwrapped, weight_owners
from .adapter import SliceAdapter, SliceUpdate


class Switch:
    """Holds at most one adapter in the weights of a model; another one takes its place, and every bit comes back.

    A switch writes `original + change`, rounded once, where the new adapter is, and the original bits where the last
    one was. Weights are the switch's to write while it holds an adapter: nobody else should change them.

    Args:
        model: with plain `nn.Linear` or `Conv1D` layers where adapters are.

    Attributes:
        current: the adapter in the weights, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.current: SliceAdapter | None = None
        self._held: dict[int, _Held] = {}  # by where the weight lies
        self._known: Any = WeakIdKeyDictionary()  # parts by adapter

    @torch.no_grad()
    def to(self, adapter: SliceAdapter | None) -> None:
        """Makes the model compute with `adapter`; None gives the base model back, to the bit.

        Raises:
            ValueError: a layer is missing, not plain, or of another size, or has a weight that cannot be written, or
                that belongs to other modules too; nothing has changed. After any other error, such as too little
                memory, `current` is None, and `to(None)` gives the base model back.
        """
        parts = [] if adapter is None else self._parts(adapter)
        before = dict(self._held)
        held: dict[int, _Held] = {}
        try:
            # Layer by layer, so that a weight that both adapters change goes through the caches once.
            for part in parts:
                place = memory_of(part.weight)  # layers may share a weight
                if (last := before.pop(place, None)) is not None:
                    last.restore()
                held.setdefault(place, _Held(part.weight)).write(part)
            for last in before.values():
                last.restore()
        except BaseException:
            self._held, self.current = {**self._held, **held}, None  # all that is needed to restore every bit
            raise
        self._held, self.current = held, adapter

    def _parts(self, adapter: SliceAdapter) -> list[_Part]:
        """What `adapter` does to each layer, checked; kept for its next turn, unless the model has changed since."""
        known: list[_Part] | None = self._known.get(adapter)
        if known is not None and all(part.is_in(unwrapped(self.model)) for part in known):
            return known
        parts = []
        linears = adapter.linears(self.model)
        owners = weight_owners(unwrapped(self.model))
        own = {id(linear) for linear in linears.values()}
        for path, linear in linears.items():
            reason = weight_obstacle(linear) or contiguity_obstacle(linear)
            if reason is None and owners[memory_of(linear.weight)] - own:
                reason = "its weight is another module's too, which a slice in it would change as well"
            if reason is not None:
                raise ValueError(f"{path} cannot hold an adapter: {reason}")
            parts.append(_Part.of(path, linear, adapter[path]))
        self._known[adapter] = parts
        return parts


@dataclass(frozen=True, eq=False)
class _Part:
    """What an adapter adds to one layer's weight as it is stored, on its device and as wide as the sum is formed."""

    path: str
    linear: nn.Module
    weight: Tensor
    axis: int
    indices: Tensor
    change: Tensor

    @classmethod
    def of(cls, path: str, linear: nn.Module, update: SliceUpdate) -> _Part:
        weight = linear.weight
        wide = torch.promote_types(torch.promote_types(weight.dtype, update.change.dtype), torch.float32)
        change = update.change.to(weight.device, wide)
        axis = update.axis
        if is_transposed(linear):
            axis, change = 1 - axis, change.t().contiguous()
        return cls(path, linear, weight, axis, update.slice.indices.to(weight.device), change)

    def is_in(self, model: nn.Module) -> bool:
        """Whether the layer is still the model's, and the weight the layer's, where and as it was."""
        module: nn.Module | None = model
        for name in self.path.split(".") if self.path else ():
            module = None if module is None else module._modules.get(name)
        weight = self.linear._parameters["weight"]
        return (
            module is self.linear
            and weight is self.weight
            and weight.device == self.indices.device
            and torch.promote_types(weight.dtype, self.change.dtype) == self.change.dtype
            and weight.is_contiguous()
        )


class _Held:
    """What a weight held before slices were written into it; several where layers share it."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._originals: list[tuple[int, Tensor, Tensor]] = []

    def write(self, part: _Part) -> None:
        weight, axis, indices = self.weight.detach(), part.axis, part.indices
        if axis == 1:
            original = backends.kernel("gather_columns", weight.device.type, weight.dtype)(weight, indices)
        else:
            original = weight.index_select(0, indices)
        self._originals.append((axis, indices, original))
        self._put(axis, indices, original + part.change)  # in the wider dtype, change's

    def restore(self) -> None:
        device = self.weight.device  # the model may have moved
        for axis, indices, original in reversed(self._originals):
            self._put(axis, indices.to(device), original.to(device))

    def _put(self, axis: int, indices: Tensor, values: Tensor) -> None:
        write = backends.kernel("slice_write_", self.weight.device.type, self.weight.dtype)
        put(self.weight, lambda plain: write(plain, indices, values, axis))
