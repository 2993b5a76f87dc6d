"""Adapters switched in place: a few channels of each weight are written, the others are not touched."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import backends
from ..nn.merged import put
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
        self._held: list[tuple[Tensor, int, Tensor, Tensor]] = []  # weight, axis, indices, original

    @torch.no_grad()
    def to(self, adapter: SliceAdapter | None) -> None:
        """Makes the model compute with `adapter`; None gives the base model back, to the bit.

        Raises:
            ValueError: a layer is missing, not plain, or of another size; nothing has changed.
        """
        linears = {} if adapter is None else adapter.linears(self.model)
        for weight, axis, indices, original in self._held:
            _write(weight, axis, indices, original)
        self._held, self.current = [], None
        for path, linear in linears.items():
            assert adapter is not None
            update, weight = adapter[path], linear.weight
            indices = update.slice.indices.to(weight.device)
            original = weight.detach().index_select(update.axis, indices)
            wide = torch.promote_types(torch.promote_types(weight.dtype, update.change.dtype), torch.float32)
            self._held.append((weight, update.axis, indices, original))
            _write(weight, update.axis, indices, original.to(wide) + update.change.to(weight.device, wide))
        self.current = adapter


def _write(weight: Tensor, axis: int, indices: Tensor, values: Tensor) -> None:
    write = backends.kernel("slice_write_", weight.device.type, weight.dtype)
    put(weight, lambda plain: write(plain, indices, values, axis))
