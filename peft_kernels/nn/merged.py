"""Keeping a sparse delta written into a weight: when to write it, how to take it out, who keeps it there."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from .. import backends


class MergedLayer(Protocol):
    """What an optimizer has to know of the layer that trains a part of its weight, to write the step into it."""

    @property
    def merged(self) -> bool:
        """Whether weight is not to be touched."""

    def update_adamw(self, trained: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *numbers: Any) -> None:
        """A step of AdamW on plain tensors, and the write into weight, in one pass.

        Args:
            trained, grad, exp_avg, exp_avg_sq: of one shape, contiguous.
            numbers: step, lr, beta1, beta2, eps and weight_decay, as in the operators.
        """

    def written(self) -> None:
        """To be called when what trains was changed and written into weight in one pass."""


class DeltaLayer(MergedLayer, Protocol):
    """The same of a layer that trains a sparse delta."""

    @property
    def weight(self) -> Tensor:
        """`[N, K]`, holding `original + values` at indices."""

    @property
    def indices(self) -> Tensor:
        """`[nnz]`, sorted, unique, flat positions, in the order of values."""

    @property
    def original(self) -> Tensor:
        """`[nnz]`, what weight held at indices before."""


# Who keeps each trained Parameter in a weight, for the optimizer that writes it back.
_layers: Any = WeakIdKeyDictionary()


def adopt(trained: Tensor, layer: MergedLayer) -> None:
    """From now on `layer` keeps this in its weight."""
    _layers[trained] = weakref.ref(layer)


def release(trained: Tensor) -> None:
    """Nobody keeps this in a weight any more."""
    _layers.pop(trained, None)


def layer_of(parameter: Tensor) -> MergedLayer | None:
    """Whoever keeps this in a weight; None for any other parameter."""
    found = _layers.get(parameter)
    return None if found is None else found()


def delta_layer_of(parameter: Tensor) -> DeltaLayer | None:
    """Whoever keeps these values of a sparse delta in a weight; None for any other parameter."""
    layer: Any = layer_of(parameter)
    return layer if parameter.dim() == 1 else None  # slices of a weight have rows and columns


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


def writable(weight: Tensor) -> Tensor:
    """weight as a plain tensor, for an operator that changes it in place.

    Raises:
        RuntimeError: weight is sharded, as between the passes of FSDP.
    """
    if not torch.compiler.is_compiling() and is_sharded(weight):
        raise RuntimeError(
            "the weight is sharded (a DTensor), so no delta can be written into it or taken out of it here; do that "
            "before fully_shard, or in a model that has loaded the gathered state_dict"
        )
    return weight.detach()


def put(weight: Tensor, write: Callable[[Tensor], None], counted: bool = True) -> None:
    """Has `write` change weight in place, which it is given as a plain tensor.

    Autograd is told that weight changed: a backward pass that still needs what it held before raises. `counted=False`
    is for putting back what such a pass needs.

    Raises:
        RuntimeError: weight is sharded, as between the passes of FSDP; nothing has changed.
    """
    write(writable(weight))
    if counted:
        count_change(weight)


def write_delta(weight: Tensor, indices: Tensor, original: Tensor, values: Tensor | None, counted: bool = True) -> None:
    """`weight[indices] = original + values`, rounded once; without values original itself, bit for bit. See `put`."""
    write = backends.kernel("scatter_write_", weight.device.type, weight.dtype)
    changes = None if values is None else values.detach()
    put(weight, lambda plain: write(plain, indices, original, changes), counted)


def update_delta(
    layer: DeltaLayer, values: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *numbers: Any
) -> None:
    """`MergedLayer.update_adamw` of a sparse delta."""
    kernel = backends.kernel("sparse_adamw_", values.device.type, values.dtype)
    kernel(values, grad, exp_avg, exp_avg_sq, layer.weight.detach(), layer.indices, layer.original, *numbers)


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
