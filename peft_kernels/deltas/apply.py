"""Deltas into weights: of a checkpoint, file to file, or of a live model, from where they can be taken back exactly."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backends import kernel
from .checkpoint import Checkpoint
from .delta import Delta, Entry, common_specs
from .merge import linear


def apply_to_checkpoint(
    checkpoint: Checkpoint,
    deltas: Sequence[Delta] | Delta,
    output: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    subtract: bool = False,
    progress: Callable[[str], object] | None = None,
) -> Path:
    """Writes a checkpoint plus deltas, a tensor at a time.

    Several deltas are added up first, so that a weight is rounded once. Subtracting what was added gives the old
    weights up to that rounding; to get them back bit for bit, keep the checkpoint, or apply to a live model.

    Args:
        checkpoint: what to add to.
        deltas: what to add; their tensors must be in the checkpoint, floating, with the same shapes.
        output: a file for a file, a directory for a directory; see `Checkpoint.rewrite`.
        weights: a factor for each delta, by default 1.
        subtract: take the deltas away instead.
        progress: told each tensor's name when it is done.

    Returns:
        The output's path. A run that is interrupted leaves what was there.

    Raises:
        ValueError: a delta does not fit; nothing is written.
    """
    deltas = [deltas] if isinstance(deltas, Delta) else list(deltas)
    for name, spec in common_specs(deltas).items():
        if name not in checkpoint:
            raise ValueError(f"the delta changes {name}, which {checkpoint.path} does not have")
        _check_target(name, spec.shape, checkpoint.shape(name), checkpoint.dtype(name))
    factors = [1.0] * len(deltas) if weights is None else list(weights)
    if subtract:
        factors = [-factor for factor in factors]
    # One delta needs no sum: its factor rides along when it is added.
    total, factor = (
        (deltas[0], _finite(factors[0])) if len(deltas) == len(factors) == 1 else (linear(deltas, factors), 1.0)
    )

    def changed(name: str) -> Tensor | None:
        if name not in total:
            return None
        entry, weight = total[name], checkpoint.read(name)
        _kernel("scatter_accumulate_", weight)(weight, entry.positions(), entry.values, factor)
        return weight

    return checkpoint.rewrite(output, changed, progress)


def _finite(weight: float) -> float:
    if not math.isfinite(weight):
        raise ValueError(f"weights must be finite, got {weight}")
    return float(weight)


def _check_target(name: str, wanted: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    if shape != wanted:
        raise ValueError(f"{name} must be {list(wanted)} for this delta, got {list(shape)}")
    if dtype is None or not dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point to be changed by a delta, got {dtype}")


def _kernel(name: str, weight: Tensor) -> Callable[..., None]:
    return kernel(name, weight.device.type, weight.dtype)


_Write = tuple[Tensor, Tensor, Tensor]
"""A weight, positions in it, and values to add or elements to write there."""


class AppliedDelta:
    """A delta in a live model, and what the weights held before.

    Made by `apply`. A context manager: the block's end removes it.
    """

    def __init__(self, model: nn.Module, delta: Delta, weight: float) -> None:
        self._model = weakref.ref(model)
        self._held: list[_Write] | None = None
        self._add(_prepared(model, delta, weight))
        _stack(model).append(self)

    @property
    def active(self) -> bool:
        """Whether the delta is in the model."""
        return self._held is not None

    def remove(self) -> None:
        """Restores the bits that the delta has changed; the original ones, whatever was trained there since.

        Raises:
            ValueError: it was removed before, or another delta was applied after it and is still there.
        """
        stack = self._own_stack()
        self._restore()
        stack.remove(self)

    def switch(self, delta: Delta, *, weight: float = 1.0) -> None:
        """Puts another delta in place of this one, from the original weights.

        Args:
            delta: the other delta, checked against the model before anything is changed.
            weight: a factor on its values.

        Raises:
            ValueError: as in `remove` and `apply`; this delta then still is in the model.
        """
        self._own_stack()
        writes = _prepared(self._live_model(), delta, weight)
        self._restore()
        self._add(writes)

    def __enter__(self) -> AppliedDelta:
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.remove()

    def _live_model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise ValueError("the model of this delta no longer exists")
        return model

    def _own_stack(self) -> list[AppliedDelta]:
        """The deltas in the model, of which this one is the last."""
        if self._held is None:
            raise ValueError("this delta was removed from the model before")
        stack = _stack(self._live_model())
        if stack[-1] is not self:
            raise ValueError("another delta was applied after this one; remove that first")
        return stack

    @torch.no_grad()
    def _add(self, writes: list[_Write]) -> None:
        self._held = []
        for target, indices, values in writes:
            original = target.view(-1)[indices.to(torch.int64)]
            self._held.append((target, indices, original))
            _write(target, indices, original, values)

    @torch.no_grad()
    def _restore(self) -> None:
        for target, indices, original in self._held or ():
            _write(target, indices, original, None)
        self._held = None


def _write(target: Tensor, indices: Tensor, original: Tensor, values: Tensor | None) -> None:
    _kernel("scatter_write_", target)(target, indices, original, values)
    torch.autograd.graph.increment_version(target)  # so that a graph that has saved the weight notices


def _prepared(model: nn.Module, delta: Delta, weight: float) -> list[_Write]:
    """What is to be added where; everything is read and checked here, so that writing it cannot fail half-way."""
    _finite(weight)
    writes = []
    for name, target in _targets(model, delta).items():
        entry = delta[name]
        entry.check(name)
        writes.append((target, entry.positions().to(target.device), _scaled(entry, weight).to(target.device)))
    return writes


def _scaled(entry: Entry, weight: float) -> Tensor:
    if weight == 1.0:
        return entry.values
    wide = torch.promote_types(entry.values.dtype, torch.float32)
    return entry.values.to(wide) * weight


def _stack(model: nn.Module) -> list[AppliedDelta]:
    return _applied.setdefault(model, [])


_applied: weakref.WeakKeyDictionary[nn.Module, list[AppliedDelta]] = weakref.WeakKeyDictionary()


def apply(model: nn.Module, delta: Delta, *, weight: float = 1.0) -> AppliedDelta:
    """Adds a delta to a live model's weights, in place, and returns the handle that takes it away again.

    What the weights held is kept beside, at the changed positions only; `handle.remove()` writes it back bit for bit.
    Deltas stack: the last one applied is the first to be removed. Everything is checked before the model is touched.

    Args:
        model: names of its parameters and buffers are the delta's tensor names.
        delta: what to add.
        weight: a factor on its values.

    Returns:
        The handle: `remove()`, `switch(other)`, or a context manager.

    Raises:
        ValueError: a tensor is missing, has another shape, is not floating, not contiguous, not a plain tensor (a meta
            tensor, a shard), or appears under two names of the delta.
    """
    return AppliedDelta(model, delta, weight)


def _targets(model: nn.Module, delta: Delta) -> dict[str, Tensor]:
    """The model's tensors that the delta changes, detached, by name."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    targets: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for name, spec in delta.specs.items():
        if name not in tensors:
            raise ValueError(f"the delta changes {name}, which the model does not have")
        tensor = tensors[name].detach()
        if type(tensor) is not Tensor or tensor.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name} must be a plain tensor on the CPU or a GPU, got {type(tensors[name]).__name__} "
                             f"on {tensor.device}")  # fmt: skip
        _check_target(name, spec.shape, tuple(tensor.shape), tensor.dtype)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        if tensor.numel():
            other = seen.setdefault(tensor.data_ptr(), name)
            if other != name:
                raise ValueError(f"{other} and {name} are one tensor in the model; the delta must name it once")
        targets[name] = tensor
    return targets
