"""What decoder layers have in common that treat selected tokens in a way of their own.

They take a layer's place and its state, are of its class too, and compute its halves from its parts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import recompute
from .asking import still_is
from .decoder_layer import Anatomy, GatedPart, RMSNormPart, anatomy_of, decoder_layer_obstacle
from .elimination_options import EliminationOptions
from .kept_tokens import Kept
from .linear import take_over
from .llama_attention import AttentionPart, call_attention, lean_attention, runs_lean
from .selections import LayerElimination, Selections, Sharing, call_of

_OWN = ("elimination",)


class SelectiveLayer(nn.Module):
    """A Llama-like decoder layer that selects tokens while it trains; what it does with them, subclasses say.

    Attributes:
        elimination: the layer's `LayerElimination`: options, counts, what is known of its parts.
        replaced_type: the class that was taken over.
        base_type: `TokenElimination` or another subclass, of which and of `replaced_type` the layer is an instance.
        method, does, cannot: what it does with tokens, for messages: as a noun, as a verb of one layer, and what layers
            that it cannot take over have.
    """

    elimination: LayerElimination
    replaced_type: type[nn.Module]
    base_type: type[SelectiveLayer]
    method: ClassVar[str]
    does: ClassVar[str]
    cannot: ClassVar[str]

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing: `__new__` returns a layer that has its state."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made while the program ran, so that its name leads nowhere.
        return _blank, (self.base_type, self.replaced_type), super().__reduce_ex__(2)[2]

    def restored(self) -> nn.Module:
        """A layer of the class that was taken over, with the state that this one has now."""
        return take_over(self, self.replaced_type, without=_OWN)

    @classmethod
    def option_obstacle(cls, module: nn.Module, options: EliminationOptions, anatomy: Anatomy) -> str | None:
        """Why these options do not go with a layer of such parts; None when they do."""
        if options.score == "attention" and not isinstance(anatomy.attention, AttentionPart):
            return f'score="attention" needs its queries and keys, but {anatomy.attention}; take another score'
        return None

    @classmethod
    def checked_anatomy(cls, module: nn.Module, options: EliminationOptions) -> Anatomy:
        """The parts of a decoder layer; raises what the class raises for its arguments."""
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
        if isinstance(module, SelectiveLayer):
            raise TypeError(f"module {module.does} already")
        reason = decoder_layer_obstacle(module)
        if reason is not None:
            raise TypeError(f"{cls.__name__} cannot take this layer over: {reason}")
        anatomy = anatomy_of(module)
        reason = cls.option_obstacle(module, options, anatomy)
        if reason is not None:
            raise ValueError(reason)
        return anatomy

    @classmethod
    def over(
        cls,
        module: nn.Module,
        sharing: Sharing,
        anatomy: Anatomy,
        selections: Selections,
        index: int,
        predictor: Callable[[Tensor], Tensor] | None = None,
    ) -> Self:
        """A layer in `module`'s place, without asking it anything; see `LayerElimination` for the arguments."""
        layer = take_over(module, class_over(cls, type(module)))
        arguments = tuple(inspect.signature(type(module).forward).parameters)[2:]
        layer.elimination = LayerElimination(sharing, anatomy, selections, index, arguments, predictor, cls.method)
        return layer  # type: ignore[return-value]

    def own_forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the class that was taken over computes."""
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return, misc]

    def cache_obstacle(self, inputs: dict[str, Any]) -> str | None:
        """Why a call with such a cache has to be the class's own; None when it has not."""
        cache = inputs.get("past_key_values")
        if cache is not None:
            if not torch.is_grad_enabled():
                return "it is called without gradients and with a cache, which has to hold every token"
            if cache.get_seq_length(getattr(self.self_attn, "layer_idx", 0)):
                return "its cache holds tokens already"
        return None

    def attention_half(self, x: Tensor, kept: Kept | None, inputs: dict[str, Any]) -> Tensor:
        """x with attention added for kept tokens, all where `kept` is None; a new tensor unless none is kept."""
        state = self.elimination
        if kept is not None and kept.rows.numel() == 0:
            return x
        rows = None if kept is None else kept.rows
        residual, h, offer = self.normalized("input_layernorm", x, rows, False)
        part, shared = state.anatomy.attention, state.selections.select_every > 1
        if kept is not None:  # a cache would not hold the others
            state.selections.short_caches.note(inputs.get("past_key_values"), call_of(inputs))
            inputs = {**inputs, "past_key_values": None, "use_cache": False}
        if isinstance(part, AttentionPart) and runs_lean(self.self_attn, part, inputs):
            mask = inputs.get("attention_mask") if kept is None else kept.attention_mask(inputs, shared)
            with offer:
                attended = lean_attention(self.self_attn, part, h, inputs["position_embeddings"], mask, kept)
            return added(residual, attended, rows, False)
        if kept is not None:
            inputs = kept.attention_inputs(inputs, shared)
        with offer:
            attended = call_attention(self.self_attn, h, **inputs)
        return added(residual, attended, rows, False)

    def mlp_half(self, x: Tensor, kept: Kept | None, owned: bool) -> Tensor:
        """x with the MLP added for kept tokens; `owned` as for `ops.split_rms_norm`."""
        if kept is not None and kept.rows.numel() == 0:
            return x
        rows = None if kept is None else kept.rows
        owned = owned and rows is not None and x.is_contiguous()
        residual, h, offer = self.normalized("post_attention_layernorm", x, rows, owned)
        part, mlp = self.elimination.anatomy.mlp, self.mlp
        if not isinstance(part, GatedPart) or not still_is(mlp, part.kind):
            with offer:
                result = mlp(h)
            return added(residual, result, rows, owned)
        gate_layer, up_layer, down_layer = (mlp._modules[name] for name in part.names)
        assert gate_layer is not None and up_layer is not None and down_layer is not None
        with offer:
            gate, up = gate_layer(h), up_layer(h)
        product = ops.swiglu(gate, up)
        with recompute.offered(product, *recompute.swiglu_recipe(gate, up)):
            result = down_layer(product)
        return added(residual, result, rows, owned)

    def normalized(self, name: str, x: Tensor, rows: Tensor | None, owned: bool) -> tuple[Tensor, Tensor, Any]:
        """x for the residual, the normalized kept tokens `[B, S, H]`, and how linear layers can form these again."""
        anatomy = self.elimination.anatomy
        part: RMSNormPart | str = anatomy.first_norm if name == "input_layernorm" else anatomy.second_norm
        norm = getattr(self, name)
        batch, _, width = x.shape
        if isinstance(part, str) or not still_is(norm, part.kind):
            h = x if rows is None else ops.gather_rows(x, rows).view(batch, -1, width)
            return x, norm(h), _nothing_offered()
        residual, h, (kept, rstd) = ops.split_rms_norm(
            x, rows, norm.weight, getattr(norm, part.eps), part.offset, owned
        )
        h = h.view(batch, -1, width)
        return residual, h, recompute.offered(h, *recompute.norm_recipe(kept, rstd, norm.weight, part.offset))


@contextmanager
def _nothing_offered() -> Iterator[None]:
    yield


def sliding_window(attention: nn.Module) -> Any:
    """The window that attention tells its kernel of, when that is not in its mask: its own, or its configuration's."""
    holder = attention if hasattr(attention, "sliding_window") else getattr(attention, "config", None)
    return getattr(holder, "sliding_window", None)


def added(residual: Tensor, values: Tensor, rows: Tensor | None, owned: bool) -> Tensor:
    """residual with values added at rows, at all for None; in place where the residual is the caller's own."""
    if rows is None:
        return residual + values
    wide = torch.promote_types(residual.dtype, values.dtype)
    if wide != residual.dtype:  # a copy, which nobody else has
        residual, owned = residual.to(wide), True
    return ops.scatter_add_rows(residual, values.to(wide), rows, in_place=owned)


_CLASSES: dict[tuple[type[SelectiveLayer], type[nn.Module]], type[SelectiveLayer]] = {}


def class_over(base: type[SelectiveLayer], kind: type[nn.Module]) -> type[SelectiveLayer]:
    """The class of layers that take the place of `kind`'s: a subclass of both, one for each pair."""
    if (base, kind) not in _CLASSES:
        name = f"{base.__name__}{kind.__name__}"
        members = {"__module__": base.__module__, "__doc__": base.__doc__, "replaced_type": kind, "base_type": base}
        _CLASSES[base, kind] = type(name, (base, kind), members)
    return _CLASSES[base, kind]


def _blank(base: type[SelectiveLayer], kind: type[nn.Module]) -> SelectiveLayer:
    """A layer without state, for pickle and copy to fill."""
    return object.__new__(class_over(base, kind))
