"""`TokenTune`, a decoder layer that has gradients, and keeps activations, for selected tokens alone while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .decoder_layer import Anatomy
from .elimination_options import EliminationOptions
from .kept_tokens import Kept, mask_obstacle
from .llama_attention import AttentionPart, lean_obstacle, selective_attention
from .selections import Selections, Sharing, call_of
from .selective_layer import SelectiveLayer, added, sliding_window


class TokenTune(SelectiveLayer):
    """A Llama-like decoder layer that computes for all tokens and differentiates by some: the rest is constant.

        x' = x, detached but in rows of selected tokens;  k', v' of these alone have a gradient
        y = x' + self_attn(input_layernorm(x'));  y = y + mlp(post_attention_layernorm(y));  y' as x'

    The function is the layer's own, to rounding: each token goes through each linear layer once, attention is over all.
    Selected queries see keys and values of all tokens, those of unselected tokens as constants.

    `TokenTune(module)` gives a layer in `module`'s place with all that it has, as `TokenElimination` does. In
    evaluation and without gradients it is `module`'s own forward, to the bit. Layers of one model should share their
    selection (`share_with`), which `pk.inject` sees to.

    A call in training that has gradients for all tokens though it should not warns, once per layer and reason, and is
    counted in `elimination.dense_calls`. A cache that holds nothing stays empty.

    Kept for backward, where the parts are as Llama has them, of S selected tokens among T, with H channels, I
    intermediate ones, h heads and g key-value heads of D channels, in e bytes each:

        e (S (2 H + 2 h D + 2 I) + T 2 g D) + 4 (2 S)

    that is of S tokens the input of each norm and its rstd, q, attention's output (for the layer behind it, where that
    trains), gate and up; of all T tokens k and v. To this come what adapters keep per selected token, and the rows,
    int32, once for all layers. Under `torch.compile` attention keeps what torch's keeps, for all tokens. Linear layers,
    norms and hooks within the layer are called twice, for selected tokens and for the others; dropout of adapters is
    drawn for each call.

    Args:
        module: a decoder layer whose attention is as Llama's, without dropout, and runs by torch's
            `scaled_dot_product_attention`; see `decoder_layer_obstacle`.
        ratio: share of the tokens of each sequence that are selected, rounded up, in (0, 1].
        score: by which tokens are selected, the largest: "random", "norm", "attention", "gradient", or a callable with
            the protocol of `token_scores.Predictor` that gives `[B, T]`; see `TokenTuneConfig`.
        seed: of random scores; None draws from torch's generator of the device.
        share_with: another layer of the model, whose selection is used, and whose `score` and `seed` count.

    Attributes:
        elimination: the layer's `LayerElimination`: options, counts, what is known of its parts.
        replaced_type: the class of `module`.

    Raises:
        TypeError: the module is no such layer; the message says why.
        ValueError: an option is out of range, or does not go with the module.

    Source: Simoulin et al., "Memory-Efficient Fine-Tuning of Transformers via Token Selection", EMNLP 2024.
    """

    method = "TokenTune"
    does = "differentiates by selected tokens"
    cannot = "cannot differentiate by selected tokens"

    def __new__(
        cls,
        module: nn.Module,
        ratio: float = 0.3,
        score: str | Callable[[Tensor], Tensor] = "random",
        seed: int | None = None,
        share_with: TokenTune | None = None,
    ) -> TokenTune:
        options = tuning_options(ratio, score)
        if share_with is not None:
            if not isinstance(share_with, TokenTune):
                raise TypeError(f"share_with must be a TokenTune layer or None, got {type(share_with).__name__}")
            first = share_with.elimination
            if first.options.keep != ratio:
                raise ValueError(f"share_with must have the same ratio, {ratio}, and has {first.options.keep}")
            options = first.options
        anatomy = cls.checked_anatomy(module, options)
        index = getattr(module.get_submodule("self_attn"), "layer_idx", None)
        index = index if isinstance(index, int) else 0
        if share_with is None:
            return cls.over(module, Sharing(options, index), anatomy, Selections(SHARED, seed), index)
        return cls.over(module, first.sharing, anatomy, first.selections, index)

    @classmethod
    def option_obstacle(cls, module: nn.Module, options: EliminationOptions, anatomy: Anatomy) -> str | None:
        """Why such a layer cannot have gradients for some tokens alone; None when it can."""
        if not isinstance(anatomy.attention, AttentionPart):
            return f"TokenTune needs its queries, keys and values, but {anatomy.attention}"
        inputs = {"position_embeddings": ()}
        attention = module.get_submodule("self_attn")
        return lean_obstacle(attention, anatomy.attention, inputs) or dropout_obstacle(attention)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states `[B, T, H]` to `[B, T, H]`; the other arguments are those of the class that was taken over."""
        state, x = self.elimination, hidden_states
        inputs = state.named(args, kwargs)
        call = call_of(inputs)
        state.selections.short_caches.check(inputs.get("past_key_values"), call)
        if state.index == state.leader:
            state.selections.begin(call, state.index)
            state.selections.remember(None)
        # Reentrant checkpointing runs forward without gradients, on hidden states that have one.
        differentiated = torch.is_grad_enabled() or x.requires_grad
        if state.selections.suspended or not self.training or not differentiated:
            return self.own_forward(x, *args, **kwargs)
        reason = self._obstacle(x, inputs)
        if reason is not None:
            state.note_dense(reason)
            return self.own_forward(x, *args, **kwargs)
        state.selections.short_caches.note(inputs.get("past_key_values"), call)
        inputs["past_key_values"] = None
        kept = state.select(self, x, inputs)
        if kept is None:  # all of them
            return self.mlp_half(self.attention_half(x, None, inputs), None, True)
        state.selections.remember(kept)
        y, others = self._attended(x, kept, inputs)
        y = self.mlp_half(y, None, True)
        with torch.no_grad():
            others = self.mlp_half(others, None, True)
        merged = ops.merge_rows(y.flatten(0, 1), others.flatten(0, 1), kept.rows, kept.others.rows)
        return merged.view(x.shape)

    def _attended(self, x: Tensor, kept: Kept, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The first half, for kept tokens `[B, S, H]` and for all others `[B, T - S, H]`."""
        part, norm = self.elimination.anatomy.attention, "input_layernorm"
        assert isinstance(part, AttentionPart)  # asked before
        residual, h, offer = self.normalized(norm, self._tokens(x, kept), None, False)
        with torch.no_grad():
            other_residual, other_h, _ = self.normalized(norm, self._tokens(x, kept.others), None, False)
        tables, mask = inputs["position_embeddings"], inputs.get("attention_mask")
        with offer:
            attended, others = selective_attention(self.self_attn, part, h, other_h, tables, mask, kept)
        return added(residual, attended, None, False), added(other_residual, others, None, False)

    def _tokens(self, x: Tensor, kept: Kept) -> Tensor:
        return ops.gather_rows(x, kept.rows).view(x.shape[0], -1, x.shape[2])

    def _obstacle(self, x: Tensor, inputs: dict[str, Any]) -> str | None:
        """Why this call has to be the class's own; None when it has not."""
        attention, mask = self.self_attn, inputs.get("attention_mask")
        reason = self.cache_obstacle(inputs)
        if reason is None:
            without_cache = {**inputs, "past_key_values": None}
            reason = lean_obstacle(attention, self.elimination.anatomy.attention, without_cache)
        reason = reason or dropout_obstacle(attention) or mask_obstacle(mask, x.shape[1])
        window = sliding_window(attention)
        if reason is None and mask is None and isinstance(window, int) and window < x.shape[1]:
            reason = f"its sliding window of {window} tokens is not in its attention mask"
        return reason

    def extra_repr(self) -> str:
        options = self.elimination.options
        return f"ratio={options.keep}, score={options.score_name}"


SHARED = 1 << 30
"""So many layers in a row share a selection: all that there are."""


def tuning_options(ratio: float, score: str | Callable[[Tensor], Tensor]) -> EliminationOptions:
    """Options of a layer that differentiates by single tokens; raises what `TokenTune` raises for its arguments."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.0 < ratio <= 1.0:
        raise ValueError(f"ratio must be in (0, 1], got {ratio!r}")
    if score == "predictor":
        raise ValueError('score must be "random", "norm", "attention", "gradient" or a callable, got "predictor"')
    return EliminationOptions(ratio, 1, score)


def dropout_obstacle(attention: nn.Module) -> str | None:
    """Why attention cannot be computed again for selected queries alone; None when it can."""
    rate = getattr(attention, "attention_dropout", 0.0)
    if rate:
        return f"its attention_dropout of {rate} cannot be drawn again for selected tokens alone"
    return None
