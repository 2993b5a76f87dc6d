"""Adapters switched in place: a few channels of each weight are written, the others are not touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import backends
from ..nn.linear import is_transposed, weight_obstacle
from ..nn.merged import count_change, writable
from ..nn.merged_linear import contiguity_obstacle
from ..planning import memory_of, unwrapped, weight_owners
from .adapter import SliceAdapter, SliceUpdate

_Step = tuple[Callable[..., None], tuple[Any, ...]]
"""A call of an operator that is still to be made."""


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
                memory, or an interrupt, `current` is None, and `to(None)` gives the base model back.
        """
        parts = [] if adapter is None else self._parts(adapter)
        before = {memory_of(last.weight): last for last in self._held.values()}  # the model may have moved
        left, held = dict(before), dict[int, _Held]()
        steps: list[_Step] = []
        try:
            # Layer by layer, so that a weight that both adapters change goes through the caches once; and all calls
            # are made ready first, as each weight drives out of the caches what Python needs to make the next one.
            for part in parts:
                place = memory_of(part.weight)  # layers may share a weight
                if place not in held:
                    held[place] = _Held(part.weight)
                steps += held[place].write(part, left.pop(place, None))
            for last in left.values():
                steps += last.restore()
            for operator, arguments in steps:
                operator(*arguments)
        except BaseException:
            self._held, self.current = _all_of(before, held), None
            raise
        self._held, self.current = held, adapter

    def _parts(self, adapter: SliceAdapter) -> list[_Part]:
        """What `adapter` does to each layer, checked; kept for its next turn, unless the model has changed since."""
        known: list[_Part] | None = self._known.get(adapter)
        model = unwrapped(self.model)
        if known is not None and all(part.is_in(model) for part in known):
            return known
        parts = []
        linears = adapter.linears(self.model)
        owners = weight_owners(model)
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
            axis, change = 1 - axis, change.t()
        indices = update.slice.indices.to(weight.device)
        return cls(path, linear, weight, axis, indices, change.contiguous())

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
    """What a weight held before slices were written into it; several where layers share it.

    Its methods return calls of operators, to be made in that order, and tell autograd of them beforehand.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.originals: list[tuple[int, Tensor, Tensor]] = []  # axis, indices, what was there

    def write(self, part: _Part, last: _Held | None) -> list[_Step]:
        """Writes a slice, and what `last` keeps back where it was: in one pass over the weight where they allow it."""
        steps: list[_Step] = []
        weight, axis, indices = self.weight, part.axis, part.indices
        held_indices = held = None
        if last is not None:
            if last.oldest_fits(part):
                steps += last.restore(but=1)
                _, held_indices, held = last.originals[0]
            else:
                steps += last.restore()
        # Kept before it is read, and marked: an interrupt may come between the kernel's return and whatever is next.
        original = torch.empty(part.change.shape, dtype=weight.dtype, device=weight.device)
        original[:1].fill_(torch.nan)
        self.originals.append((axis, indices, original))
        exchange = backends.kernel("slice_exchange_", weight.device.type, weight.dtype)
        steps.append((exchange, (writable(weight), held_indices, held, indices, part.change, original, axis)))
        count_change(weight)
        return steps

    def oldest_fits(self, part: _Part) -> bool:
        """Whether the original that comes back last can do so in one pass with a slice."""
        if self.weight is not part.weight or not self.originals:
            return False
        axis, _, original = self.originals[0]
        return axis == part.axis and original.dtype == part.weight.dtype and original.device == part.weight.device

    def restore(self, but: int = 0) -> list[_Step]:
        """Puts originals back, the youngest first, all but the `but` oldest ones."""
        if len(self.originals) <= but:
            return []
        device = self.weight.device  # the model may have moved
        write = backends.kernel("slice_write_", device.type, self.weight.dtype)
        weight = writable(self.weight)
        count_change(self.weight)
        return [
            (write, (weight, indices.to(device), original.to(device), axis))
            for axis, indices, original in reversed(self.originals[but:])
        ]


def _all_of(before: dict[int, _Held], after: dict[int, _Held]) -> dict[int, _Held]:
    """All that is needed to restore every bit, wherever a switch broke off; putting back twice does no harm."""
    together = {}
    for place in before.keys() | after.keys():
        parts = [held for held in (before.get(place), after.get(place)) if held is not None]
        together[place] = _Held(parts[0].weight)
        together[place].originals = [entry for held in parts for entry in held.originals if _was_read(entry[2])]
    return together


def _was_read(original: Tensor) -> bool:
    """Whether the kernel has been there: what it fills with a weight's bits began with a row of NaNs."""
    return not bool(original[:1].isnan().all())
