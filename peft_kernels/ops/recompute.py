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
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..reference.lora import as_rows
from ._checks import transforms_active

Form = Callable[..., Tensor]
"""Makes the offered tensor from its sources: the same bits each time, and nothing but the sources in it."""


class _Formed:
    """An offered tensor that was formed again, and how many layers of the backward pass have yet to take it.

    The pass holds it, in the callback for its end; the recipe only knows of it. So it goes with a pass that fails, too.
    """

    def __init__(self, tensor: Tensor, left: int) -> None:
        self.tensor: Tensor | None = tensor
        self.left = left

    def let_go(self) -> None:
        self.tensor = None


class _Recipe:
    """One offered tensor in backward: formed once for all the layers of a pass that kept the recipe."""

    def __init__(self, form: Form) -> None:
        self._form, self._lock = form, threading.Lock()
        self._consumers = 0
        self._formed: weakref.WeakValueDictionary[int, _Formed] = weakref.WeakValueDictionary()  # by pass

    def kept_once_more(self) -> None:
        """Counts a layer that will want the tensor in backward."""
        self._consumers += 1

    def again(self, sources: list[Tensor]) -> Tensor:
        """The tensor, as rows; called once by each layer in each backward pass."""
        if torch.compiler.is_compiling():  # of a backward pass alone: it drops what it finds twice
            return self._form(*sources)
        task = torch._C._current_graph_task_id()  # type: ignore[attr-defined]
        with self._lock:
            formed = self._formed.get(task)
            if formed is None:
                with torch.no_grad():
                    tensor = self._form(*sources)
                if self._consumers > 1:
                    formed = self._formed[task] = _Formed(tensor, self._consumers - 1)
                    torch.autograd.Variable._execution_engine.queue_callback(formed.let_go)  # type: ignore[attr-defined]
                return tensor
            tensor = formed.tensor
            formed.left -= 1
            if formed.left == 0:  # not all of them need run, so that this may never come
                self._formed.pop(task).let_go()
            return tensor


def _hooks() -> Any:
    """What is done here to saved tensors, by activation checkpointing for one."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class _Offer:
    """A tensor on offer while its context lasts."""

    def __init__(self, tensor: Tensor, sources: tuple[Tensor, ...], form: Form) -> None:
        self._tensor, self._version = tensor, tensor._version
        self._sources, self._form = tuple(source.detach() for source in sources), form
        self._recipe, self._hooks = _Recipe(form), _hooks()
        self._casts: dict[torch.dtype, _Offer] = {}

    def __enter__(self) -> None:
        _offers().append(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _offers().remove(self)
        self._casts.clear()

    def taken_for(self, x: Tensor) -> tuple[_Recipe, tuple[Tensor, ...]] | None:
        """The recipe if `x` is the offered tensor, or a cast of it."""
        if self.matches(x):
            self._recipe.kept_once_more()
            return self._recipe, self._sources
        cast = self._casts.get(x.dtype)
        return None if cast is None else cast.taken_for(x)

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """If `x` is the offered tensor, its copy of this dtype, which all layers share."""
        if not self.matches(x):
            return None
        if dtype not in self._casts:
            form = self._form
            copy = self._tensor.detach().to(dtype)
            self._casts[dtype] = _Offer(copy, self._sources, lambda *sources: form(*sources).to(dtype))
        return _CastFunction.apply(x, self._casts[dtype]._tensor)  # type: ignore[no-any-return, no-untyped-call]

    def matches(self, x: Tensor) -> bool:
        """Whether x is the offered tensor: itself, or other leading dimensions on the same rows.

        It is not under other hooks than those of the offer. Where activation checkpointing runs a layer again, this
        offer is over, and the layer must keep then what it kept at first.
        """
        tensor = self._tensor
        return (
            x.untyped_storage()._cdata == tensor.untyped_storage()._cdata  # which fakes of tensors have as well
            and x.storage_offset() == tensor.storage_offset()
            and x.numel() == tensor.numel()
            and x.shape[-1:] == tensor.shape[-1:]
            and x.dtype == tensor.dtype
            and x.is_contiguous()
            and x._version == self._version  # of views it is shared: nobody has changed the tensor since
            and _hooks() == self._hooks
        )


class _CastFunction(torch.autograd.Function):
    """`x.to(dtype)`, given as a copy that others use too; its gradient goes to x in x's dtype, without the others'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copy: Tensor) -> Tensor:  # type: ignore[override]
        ctx.dtype = x.dtype
        return torch.ops.aten._unsafe_view(copy, x.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.to(ctx.dtype), None


_stacks = threading.local()


def _offers() -> list[_Offer]:
    stack: list[_Offer] | None = getattr(_stacks, "offers", None)
    if stack is None:
        stack = _stacks.offers = []
    return stack


def offered(tensor: Tensor, sources: tuple[Tensor, ...], form: Form) -> AbstractContextManager[None]:
    """While the context lasts, layers of this library that would keep `tensor` keep `sources` and form it again.

    They do so to the bit, so gradients do not change. Under autocast the tensor is cast once for all layers, and they
    keep `sources` as well.

    It composes with hooks on saved tensors and with activation checkpointing of both kinds, around the context or in
    it: sources are saved by `save_for_backward`, and a layer under hooks that were set in the context, as checkpointing
    does, keeps its input. The offer holds for the calling thread.

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
    if torch.compiler.is_compiling() or transforms_active() or tensor.numel() == 0 or tensor.is_inference():
        return nullcontext()
    if not tensor.is_contiguous():
        raise ValueError(f"recompute.offered: tensor must be contiguous, got strides {list(tensor.stride())}")
    return _Offer(tensor, sources, form)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, for layers under autocast; of a tensor on offer one copy for all of them, on offer as it is."""
    if x.dtype != dtype and not torch.compiler.is_compiling() and not transforms_active():
        for offer in reversed(_offers()):
            copy = offer.cast(x, dtype)
            if copy is not None:
                return copy
    return x.to(dtype)


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


def saved(ctx: Any, tensors: list[Tensor], argument: int = 0) -> Tensor:
    """`x` in backward, from what `to_save` returned in forward: with x's last dimension. Call it once in each backward.

    Args:
        ctx: that of forward.
        tensors: what `to_save` returned.
        argument: which one of the Function's arguments x is.

    Raises:
        RuntimeError: the gradient is to be differentiated again and x, which requires a gradient, was not kept.
    """
    if ctx.recipe is None:
        return tensors[0]
    if torch.is_grad_enabled() and ctx.needs_input_grad[argument]:
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
