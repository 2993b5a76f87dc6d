"""Inputs that are formed again in backward from less than themselves, instead of being kept.

A linear layer whose weights train keeps its input. Where that input is a cheap function of tensors that are kept anyway
(a norm's output of its input, a gated activation of gate and up), whoever calls the layer offers the recipe:

    with recompute.offered(h, *recompute.norm_recipe(kept, rstd, weight)):
        q, k, v = q_proj(h), k_proj(h), v_proj(h)

and a layer of this library that would keep exactly `h` keeps the recipe's sources, by reference. In backward the first
of the layers forms `h` again, the others take it from there, and it is let go of with the last of them, at the latest
where that backward pass ends.

Where nobody takes an offer nothing changes. Under `torch.compile`, whose partitioner decides what is formed again, and
inside `torch.func` transforms, offers do nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..reference.lora import as_rows

Form = Callable[..., Tensor]
"""Makes the offered tensor from its sources: the same bits each time, and nothing but the sources in it."""


class _Recipe:
    """One offered tensor in backward: formed once for all the layers of a pass that kept the recipe."""

    def __init__(self, form: Form) -> None:
        self._form, self._lock = form, threading.Lock()
        self._consumers = 0
        self._formed: Tensor | None = None
        self._left, self._task = 0, -1

    def kept_once_more(self) -> None:
        """Counts a layer that will want the tensor in backward."""
        self._consumers += 1

    def again(self, sources: list[Tensor]) -> Tensor:
        """The tensor, as rows; called once by each layer in each backward pass."""
        if torch.compiler.is_compiling():  # of a backward pass alone: it drops what it finds twice
            return self._form(*sources)
        task = torch._C._current_graph_task_id()  # type: ignore[attr-defined]
        with self._lock:
            formed = self._formed
            if formed is None or self._task != task:
                with torch.no_grad():
                    formed = self._form(*sources)
                self._formed, self._task, self._left = formed, task, self._consumers
                if self._left > 1:  # some of them may not run in this pass
                    torch.autograd.Variable._execution_engine.queue_callback(lambda: self._let_go(task))  # type: ignore[attr-defined]
            self._left -= 1
            if self._left == 0:
                self._formed = None
            return formed

    def _let_go(self, task: int) -> None:
        with self._lock:
            if self._task == task:
                self._formed = None


class _Offer:
    """A tensor on offer while its context lasts."""

    def __init__(self, tensor: Tensor, sources: tuple[Tensor, ...], form: Form) -> None:
        self._tensor, self._version = tensor, tensor._version
        self._sources, self._recipe = tuple(source.detach() for source in sources), _Recipe(form)

    def __enter__(self) -> None:
        _offers().append(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _offers().remove(self)

    def matches(self, x: Tensor) -> bool:
        """Whether `x` is the offered tensor: itself, or other leading dimensions on the same rows."""
        tensor = self._tensor
        return (
            x.untyped_storage()._cdata == tensor.untyped_storage()._cdata  # which fakes of tensors have as well
            and x.storage_offset() == tensor.storage_offset()
            and x.numel() == tensor.numel()
            and x.shape[-1:] == tensor.shape[-1:]
            and x.dtype == tensor.dtype
            and x.is_contiguous()
            and x._version == self._version  # of views it is shared: nobody has changed the tensor since
        )

    def taken_for(self, x: Tensor) -> tuple[_Recipe, tuple[Tensor, ...]] | None:
        """The recipe if `x` is the offered tensor."""
        if not self.matches(x):
            return None
        self._recipe.kept_once_more()
        return self._recipe, self._sources


_stacks = threading.local()


def _offers() -> list[_Offer]:
    stack: list[_Offer] | None = getattr(_stacks, "offers", None)
    if stack is None:
        stack = _stacks.offers = []
    return stack


def offered(tensor: Tensor, sources: tuple[Tensor, ...], form: Form) -> AbstractContextManager[None]:
    """While the context lasts, layers of this library that would keep `tensor` keep `sources` and form it again.

    They do so to the bit, so gradients do not change. It composes with activation checkpointing of both kinds and with
    hooks on saved tensors: sources are saved by `save_for_backward`. The offer holds for the calling thread.

    Args:
        tensor: the input of the layers that are called in the context; contiguous. Layers may get it with other
            leading dimensions.
        sources: what `form` takes. They must not be changed in place before backward, which is checked there.
        form: `form(*sources)` is `tensor`, in any shape with the same last dimension. It runs without a graph, in
            backward.

    Raises:
        ValueError: tensor is not contiguous.
        RuntimeError, from a second derivative (`create_graph=True`) through a layer that took the offer while its input
            requires a gradient: what is formed again has no history.
    """
    if torch.compiler.is_compiling() or _transforms_active() or tensor.numel() == 0 or tensor.is_inference():
        return nullcontext()
    if not tensor.is_contiguous():
        raise ValueError(f"recompute.offered: tensor must be contiguous, got strides {list(tensor.stride())}")
    return _Offer(tensor, sources, form)


_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def is_offered(x: Tensor) -> bool:
    """Whether a layer of this library that would keep `x` finds it on offer."""
    if torch.compiler.is_compiling():
        return False
    return any(offer.matches(x) for offer in _offers())


def to_save(ctx: Any, x: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a Function saves, behind its other tensors, to have `x` in backward; None where it does not need x."""
    ctx.recipe = None
    if x is None or torch.compiler.is_compiling():
        return (x,)
    for offer in reversed(_offers()):
        taken = offer.taken_for(x)
        if taken is not None:
            ctx.recipe, sources = taken
            return sources
    return (x,)


def saved(ctx: Any, tensors: list[Tensor]) -> Tensor:
    """`x` in backward, from what `to_save` returned in forward: with x's last dimension. Call it once in each backward.

    The Function's first argument is x.

    Raises:
        RuntimeError: the gradient is to be differentiated again and x, which requires a gradient, was not kept.
    """
    if ctx.recipe is None:
        return tensors[0]
    if torch.is_grad_enabled() and ctx.needs_input_grad[0]:
        raise RuntimeError(
            "a second derivative needs the layer's input, which was not kept but offered by recompute.offered; "
            "call the layer outside of it"
        )
    return ctx.recipe.again(tensors)  # type: ignore[no-any-return]


def norm_recipe(
    kept: Tensor, rstd: Tensor, weight: Tensor, offset: float = 0.0
) -> tuple[tuple[Tensor, Tensor, Tensor], Form]:
    """`(sources, form)` of a normalized tensor, by what `split_rms_norm` returned beside it.

    Args:
        kept: `[S, H]`.
        rstd: `[S]`.
        weight, offset: as `split_rms_norm` was given.
    """
    normalize = backends.kernel("rms_norm_rows", kept.device.type, kept.dtype, backends.forced_backend())
    return (kept, rstd, weight), lambda kept, rstd, weight: normalize(as_rows(kept), rstd, weight, offset)


def swiglu_recipe(gate: Tensor, up: Tensor) -> tuple[tuple[Tensor, Tensor], Form]:
    """`(sources, form)` of `silu(gate) * up` as `swiglu` and `swiglu_s2ft` return it.

    Args:
        gate, up: `[..., K]`.
    """
    swiglu = backends.kernel("swiglu", gate.device.type, gate.dtype, backends.forced_backend())

    def form(gate: Tensor, up: Tensor) -> Tensor:
        none = torch.empty(0, dtype=torch.int64, device=gate.device)
        return swiglu(as_rows(gate), as_rows(up), none)[0]  # type: ignore[no-any-return]

    return (gate, up), form
