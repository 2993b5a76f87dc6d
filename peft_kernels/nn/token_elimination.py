"""`TokenElimination`, a decoder layer that computes for the most informative tokens alone while it trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import recompute
from .asking import still_is
from .decoder_layer import Anatomy, GatedPart, RMSNormPart, anatomy_of, decoder_layer_obstacle
from .kept_tokens import Kept, mask_obstacle
from .linear import take_over
from .llama_attention import AttentionPart, call_attention, lean_attention, runs_lean
from .selections import EliminationOptions, LayerElimination, Selections

_OWN = ("elimination",)


class TokenElimination(nn.Module):
    """A Llama-like decoder layer of which each half computes for some tokens alone, the others pass by untouched.

        y = x;  y[rows] += self_attn(input_layernorm(x[rows]));  y[rows] += mlp(post_attention_layernorm(y[rows]))

    `TokenElimination(module)` gives a layer in `module`'s place with all that it has: parameters, their names, hooks,
    attributes. It is an instance of `module`'s class too, so that what goes by classes still finds it (activation
    checkpointing and recorded outputs of transformers, wrapping by FSDP). `module` is not changed. In evaluation it
    computes what `module` computes, to the bit; so it does in training when it gets a cache that holds tokens.

    Kept tokens attend to kept tokens, at the positions that they have among all. Which are kept is known only when all
    are there, so a token is dropped for what comes behind it: this is for training alone.

    A call in training that drops nothing warns, once per layer and reason, and is counted in
    `elimination.dense_calls`.

    Kept for backward, per kept token, where the parts are as Llama has them: the input of each norm and its rstd, what
    attention keeps (q, k, v, its output, the sum of each row), gate and up. Not kept: what the norms return,
    `silu(gate)` and its product with up. Per layer: the rows, int32.

    Args:
        module: a decoder layer; see `decoder_layer_obstacle`.
        keep: share of the blocks of each sequence that are kept, rounded up; 1 keeps all, 0 none.
        block_size: tokens that are kept or dropped together. Those behind the last whole block are kept.
        score: "attention", "norm", "random", "gradient", "predictor", or a callable with the protocol of
            `token_scores.Predictor`; see `TokenEliminationConfig`.
        apply_to: "attention", "mlp" or "both".
        train_only: False eliminates in evaluation too.
        threshold: blocks with a smaller score are not kept either; a number or a scalar tensor.
        predictor: for score="predictor".

    Attributes:
        elimination: the layer's `LayerElimination`: options, counts, what is known of its parts.
        replaced_type: the class of `module`.

    Raises:
        TypeError: the module is no such layer; the message says why.
        ValueError: an option is out of range, or does not go with the module.

    Source: Wang et al., "LeMo: Enabling Less Token Involvement for More Context Fine-tuning", 2025 (JENGA, USENIX ATC
    2025).
    """

    elimination: LayerElimination
    replaced_type: type[nn.Module]

    def __new__(
        cls,
        module: nn.Module,
        keep: float = 0.5,
        block_size: int = 64,
        score: str | Callable[[Tensor], Tensor] = "attention",
        apply_to: str = "both",
        train_only: bool = True,
        threshold: float | Tensor | None = None,
        predictor: Callable[[Tensor], Tensor] | None = None,
    ) -> TokenElimination:
        options = EliminationOptions(keep, block_size, score, apply_to, train_only, threshold)
        anatomy = checked_anatomy(module, options)
        index = getattr(module.get_submodule("self_attn"), "layer_idx", None)
        index = index if isinstance(index, int) else 0
        return over(module, options, anatomy, Selections(), index, index, predictor)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing: `__new__` returns a layer that has its state."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made while the program ran, so that its name leads nowhere.
        return _blank, (self.replaced_type,), super().__reduce_ex__(2)[2]

    def restored(self) -> nn.Module:
        """A layer of the class that was taken over, with the state that this one has now."""
        return take_over(self, self.replaced_type, without=_OWN)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states `[B, T, H]` to `[B, T, H]`; the other arguments are those of the class that was taken over."""
        state = self.elimination
        if state.selections.suspended or (state.options.train_only and not self.training):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return, misc]
        inputs = state.named(args, kwargs)
        reason = self._obstacle(hidden_states, inputs)
        if reason is not None:
            state.note_dense(reason)
            state.remember(hidden_states, None)
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return, misc]
        kept = state.select(self, hidden_states, inputs)
        state.remember(hidden_states, kept)
        half = state.options.apply_to
        y = self._attention_half(hidden_states, None if half == "mlp" else kept, inputs)
        return self._mlp_half(y, None if half == "attention" else kept, y is not hidden_states)

    def _obstacle(self, x: Tensor, inputs: dict[str, Any]) -> str | None:
        """Why this call has to be the class's own; None when it has not."""
        options, attention = self.elimination.options, self.self_attn
        cache = inputs.get("past_key_values")
        if cache is not None:
            if not torch.is_grad_enabled():
                return "it is called without gradients and with a cache, which has to hold every token"
            if cache.get_seq_length(getattr(attention, "layer_idx", 0)):
                return "its cache holds tokens already"
        if options.apply_to == "mlp" and options.score != "attention":
            return None
        if inputs.get("position_embeddings") is None:
            return "it gets no position_embeddings, so that attention would count kept tokens"
        mask = inputs.get("attention_mask")
        reason = mask_obstacle(mask, x.shape[1])
        window = sliding_window(attention)
        if reason is None and isinstance(window, int) and window < x.shape[1] and (mask is None or mask.dim() != 4):
            reason = f"its sliding window of {window} tokens would count kept tokens"
        return reason

    def _attention_half(self, x: Tensor, kept: Kept | None, inputs: dict[str, Any]) -> Tensor:
        state = self.elimination
        if kept is not None and kept.rows.numel() == 0:
            return x
        rows = None if kept is None else kept.rows
        residual, h, offer = self._normalized("input_layernorm", state.anatomy.first_norm, x, rows, False)
        part, shared = state.anatomy.attention, state.selections.select_every > 1
        if isinstance(part, AttentionPart) and runs_lean(self.self_attn, part, inputs):
            mask = inputs.get("attention_mask") if kept is None else kept.attention_mask(inputs, shared)
            with offer:
                attended = lean_attention(self.self_attn, part, h, inputs["position_embeddings"], mask, kept)
            return _added(residual, attended, rows, False)
        if kept is not None:
            inputs = kept.attention_inputs(inputs, shared)
        with offer:
            attended = call_attention(self.self_attn, h, **inputs)
        return _added(residual, attended, rows, False)

    def _mlp_half(self, x: Tensor, kept: Kept | None, owned: bool) -> Tensor:
        if kept is not None and kept.rows.numel() == 0:
            return x
        rows = None if kept is None else kept.rows
        owned = owned and rows is not None
        norm = self.elimination.anatomy.second_norm
        residual, h, offer = self._normalized("post_attention_layernorm", norm, x, rows, owned)
        part, mlp = self.elimination.anatomy.mlp, self.mlp
        if not isinstance(part, GatedPart) or not still_is(mlp, part.kind):
            with offer:
                added = mlp(h)
            return _added(residual, added, rows, owned)
        gate_layer, up_layer, down_layer = (mlp._modules[name] for name in part.names)
        assert gate_layer is not None and up_layer is not None and down_layer is not None
        with offer:
            gate, up = gate_layer(h), up_layer(h)
        product = ops.swiglu(gate, up)
        with recompute.offered(product, *recompute.swiglu_recipe(gate, up)):
            added = down_layer(product)
        return _added(residual, added, rows, owned)

    def _normalized(
        self, name: str, part: RMSNormPart | str, x: Tensor, rows: Tensor | None, owned: bool
    ) -> tuple[Tensor, Tensor, Any]:
        """x for the residual, the normalized kept tokens `[B, S, H]`, and how linear layers can form these again."""
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

    def extra_repr(self) -> str:
        options = self.elimination.options
        threshold = "" if options.threshold is None else f", threshold={options.threshold}"
        return (
            f"keep={options.keep}, block_size={options.block_size}, score={options.score_name}, "
            f"apply_to={options.apply_to}{threshold}"
        )


@contextmanager
def _nothing_offered() -> Iterator[None]:
    yield


def sliding_window(attention: nn.Module) -> Any:
    """The window that attention tells its kernel of, when that is not in its mask: its own, or its configuration's."""
    holder = attention if hasattr(attention, "sliding_window") else getattr(attention, "config", None)
    return getattr(holder, "sliding_window", None)


def _added(residual: Tensor, values: Tensor, rows: Tensor | None, owned: bool) -> Tensor:
    if rows is None:
        return residual + values
    wide = torch.promote_types(residual.dtype, values.dtype)
    if wide != residual.dtype:  # a copy, which nobody else has
        residual, owned = residual.to(wide), True
    return ops.scatter_add_rows(residual, values.to(wide), rows, in_place=owned)


def option_obstacle(options: EliminationOptions, anatomy: Anatomy) -> str | None:
    """Why these options do not go with a layer of such parts; None when they do."""
    if options.score == "attention" and not isinstance(anatomy.attention, AttentionPart):
        return f'score="attention" needs its queries and keys, but {anatomy.attention}; take another score'
    return None


def checked_anatomy(module: nn.Module, options: EliminationOptions) -> Anatomy:
    """The parts of a decoder layer; raises what `TokenElimination` raises."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if isinstance(module, TokenElimination):
        raise TypeError("module eliminates tokens already")
    reason = decoder_layer_obstacle(module)
    if reason is not None:
        raise TypeError(f"TokenElimination cannot take this layer over: {reason}")
    anatomy = anatomy_of(module)
    reason = option_obstacle(options, anatomy)
    if reason is not None:
        raise ValueError(reason)
    return anatomy


def over(
    module: nn.Module,
    options: EliminationOptions,
    anatomy: Anatomy,
    selections: Selections,
    index: int,
    leader: int,
    predictor: Callable[[Tensor], Tensor] | None = None,
) -> TokenElimination:
    """A layer in `module`'s place, without asking it anything; see `LayerElimination` for the arguments."""
    layer = take_over(module, eliminating_class(type(module)))
    arguments = tuple(inspect.signature(type(module).forward).parameters)[2:]
    layer.elimination = LayerElimination(options, anatomy, selections, leader, index, arguments, predictor)
    return layer


_CLASSES: dict[type[nn.Module], type[TokenElimination]] = {}


def eliminating_class(kind: type[nn.Module]) -> type[TokenElimination]:
    """The class of layers that take the place of `kind`'s: a subclass of both, one for each `kind`."""
    if kind not in _CLASSES:
        name = f"TokenElimination{kind.__name__}"
        _CLASSES[kind] = type(
            name,
            (TokenElimination, kind),
            {"__module__": __name__, "__doc__": TokenElimination.__doc__, "replaced_type": kind},
        )
    return _CLASSES[kind]


def _blank(kind: type[nn.Module]) -> TokenElimination:
    """A layer without state, for pickle and copy to fill."""
    return object.__new__(eliminating_class(kind))
