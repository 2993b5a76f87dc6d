"""Keeping a sparse delta written into a weight: when to write it, how to take it out, who keeps it there."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from .. import backends


class DeltaLayer(Protocol):
    """What an optimizer has to know of the layer whose deltas it trains, to write them into the weight itself."""

    @property
    def weight(self) -> Tensor:
        """`[N, K]`, holding `original + values` at indices."""

    @property
    def indices(self) -> Tensor:
        """`[nnz]`, sorted, unique, flat positions, in the order of values."""

    @property
    def original(self) -> Tensor:
        """`[nnz]`, what weight held at indices before."""

    @property
    def merged(self) -> bool:
        """Whether weight is not to be touched."""

    def written(self) -> None:
        """To be called when values were changed and written into weight in one pass."""


# Who keeps each trainable `values` written, for the optimizer that writes them back.
_layers: Any = WeakIdKeyDictionary()


def adopt(values: Tensor, layer: DeltaLayer) -> None:
    """From now on `layer` keeps these deltas in its weight."""
    _layers[values] = weakref.ref(layer)


def release(values: Tensor) -> None:
    """Nobody keeps these deltas in a weight any more."""
    _layers.pop(values, None)


def layer_of(values: Tensor) -> DeltaLayer | None:
    """Whoever keeps these deltas in a weight; None for any other parameter."""
    found = _layers.get(values)
    return None if found is None else found()


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Tells torch that an optimizer has changed its deltas: fused ones (`fused=True`, most in CUDA) leave that out, and
    a layer would take what it has written for the present values."""
    if not _layers or getattr(optimizer, "writes_deltas", False):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in _layers:
                count_change(parameter)


register_optimizer_step_post_hook(_after_step)


def write_delta(weight: Tensor, indices: Tensor, original: Tensor, values: Tensor | None, counted: bool = True) -> None:
    """`weight[indices] = original + values`, rounded once; without values original itself, bit for bit.

    Autograd is told that weight changed: a backward pass that still needs what it held before raises. `counted=False`
    is for putting back what such a pass needs.

    Raises:
        RuntimeError: weight is sharded, as between the passes of FSDP; nothing has changed.
    """
    if not torch.compiler.is_compiling() and is_sharded(weight):
        raise RuntimeError(
            "the weight is sharded (a DTensor), so no delta can be written into it or taken out of it here; do that "
            "before fully_shard, or in a model that has loaded the gathered state_dict"
        )
    write = backends.kernel("scatter_write_", weight.device.type, weight.dtype)
    write(weight.detach(), indices, original, None if values is None else values.detach())
    if counted:
        count_change(weight)


def is_sharded(tensor: Tensor) -> bool:
    """Whether tensor is a DTensor, of which this process holds a part."""
    return hasattr(tensor, "to_local")


def count_change(tensor: Tensor) -> None:
    """Tells autograd that an operator has changed `tensor` in place."""
    if not torch.compiler.is_compiling() and not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def entries_of(weight: Tensor, indices: Tensor) -> Tensor:
    """`weight[indices]`, a new tensor `[nnz]`."""
    return weight.detach().view(-1)[indices.to(torch.int64)]


class Stamp:
    """Remembers which values a layer has written into its weight.

    Torch counts the in-place changes of every tensor, so the same tensors with the same counts in the same memory mean
    that nothing has happened since; what is done in place to a tensor's `.data` it does not count. That holds for the
    weight that the layer was built around, its own; another one in its place has been gathered for the moment (FSDP),
    and is written to in every pass.
    """

    def __init__(self, weight: Tensor) -> None:
        self._own = weakref.ref(weight)
        self._written: tuple[tuple[int, int], Any, tuple[int, int]] | None = None
        self._doubted = False

    def owns(self, weight: Tensor) -> bool:
        """Whether weight is the layer's own."""
        return self._own() is weight

    def set(self, weight: Tensor, values: Tensor) -> None:
        """The present values are in weight now."""
        if self.owns(weight) and not weight.is_inference() and not values.is_inference():
            self._written = (_state(weight), weakref.ref(values), _state(values))
            self._doubted = False

    def clear(self) -> None:
        """Nothing is known of what weight holds."""
        self._written = None

    def doubt(self) -> None:
        """To be called in backward: the next use writes values again, even if torch counts no change.

        For optimizers that change them behind torch's back, through `.data` or in kernels of their own.
        """
        self._doubted = True

    def holds(self, weight: Tensor, values: Tensor) -> bool:
        """Whether weight holds the present values for certain."""
        return not self._doubted and self.counts_agree(weight, values)

    def counts_agree(self, weight: Tensor, values: Tensor) -> bool:
        """Whether weight holds the present values as far as torch counts changes."""
        if self._written is None or not self.owns(weight):
            return False
        weight_then, written, values_then = self._written
        return written() is values and _state(weight) == weight_then and _state(values) == values_then


def _state(tensor: Tensor) -> tuple[int, int]:
    """How often tensor was changed in place, and where it lies: `.data = ...` changes only that."""
    try:
        return tensor._version, tensor.data_ptr()
    except RuntimeError:  # inside torch.func's transforms, where it has no memory of its own
        return tensor._version, 0
