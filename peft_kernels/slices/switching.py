"""Adapters switched in place: a few channels of each weight are written, the others are not touched."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import backends
from ..nn.linear import weight_obstacle
from ..nn.merged import put
from ..nn.merged_linear import contiguity_obstacle
from .adapter import SliceAdapter


class Switch:
    """Holds at most one adapter in the weights of a model; another one takes its place, and every bit comes back.

    A switch writes `original + change`, rounded once, where the new adapter is, and the original bits where the last
    one was. Weights are the switch's to write while it holds an adapter: nobody else should change them.

    Args:
        model: with plain `nn.Linear` layers where adapters are.

    Attributes:
        current: the adapter in the weights, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.current: SliceAdapter | None = None
        self._held: dict[int, _Held] = {}  # by the weight's id

    @torch.no_grad()
    def to(self, adapter: SliceAdapter | None) -> None:
        """Makes the model compute with `adapter`; None gives the base model back, to the bit.

        Raises:
            ValueError: a layer is missing, not plain, or of another size, or has a weight that cannot be written;
                nothing has changed.
        """
        linears = {} if adapter is None else adapter.linears(self.model)
        for path, linear in linears.items():
            reason = weight_obstacle(linear) or contiguity_obstacle(linear)
            if reason is not None:
                raise ValueError(f"{path} cannot hold an adapter: {reason}")
        before, self._held, self.current = self._held, {}, None
        # Layer by layer, so that a weight that both adapters change goes through the caches once.
        for path, linear in linears.items():
            assert adapter is not None
            update, weight = adapter[path], linear.weight
            if (last := before.pop(id(weight), None)) is not None:
                last.restore()
            held = self._held.setdefault(id(weight), _Held(weight))
            held.write(update.axis, update.slice.indices.to(weight.device), update.change.to(weight.device))
        for last in before.values():
            last.restore()
        self.current = adapter


class _Held:
    """What a weight held before slices were written into it; several where layers share it."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._originals: list[tuple[int, Tensor, Tensor]] = []

    def write(self, axis: int, indices: Tensor, change: Tensor) -> None:
        weight = self.weight.detach()
        if axis == 1:
            original = backends.kernel("gather_columns", weight.device.type, weight.dtype)(weight, indices)
        else:
            original = weight.index_select(0, indices)
        wide = torch.promote_types(torch.promote_types(weight.dtype, change.dtype), torch.float32)
        self._originals.append((axis, indices, original))
        self._put(axis, indices, original.to(wide) + change.to(wide))

    def restore(self) -> None:
        for axis, indices, original in reversed(self._originals):
            self._put(axis, indices, original)

    def _put(self, axis: int, indices: Tensor, values: Tensor) -> None:
        write = backends.kernel("slice_write_", self.weight.device.type, self.weight.dtype)
        put(self.weight, lambda plain: write(plain, indices, values, axis))
