"""`TokenElimination`, a decoder layer that computes for the most informative tokens alone while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .elimination_options import EliminationOptions
from .kept_tokens import mask_obstacle
from .selections import Selections, Sharing, call_of
from .selective_layer import SelectiveLayer, sliding_window


class TokenElimination(SelectiveLayer):
    """A Llama-like decoder layer of which each half computes for some tokens alone, the others pass by untouched.

        y = x;  y[rows] += self_attn(input_layernorm(x[rows]));  y[rows] += mlp(post_attention_layernorm(y[rows]))

    `TokenElimination(module)` gives a layer in `module`'s place with all that it has: parameters, their names, hooks,
    attributes. It is an instance of `module`'s class too, so that what goes by classes still finds it (activation
    checkpointing and recorded outputs of transformers, wrapping by FSDP). `module` is not changed. In evaluation it
    computes what `module` computes, to the bit; so it does in training when it gets a cache that holds tokens.

    Kept tokens attend to kept tokens, at the positions that they have among all. Which are kept is known only when all
    are there, so a token is dropped for what comes behind it: this is for training alone.

    A call in training that drops nothing warns, once per layer and reason, and is counted in
    `elimination.dense_calls`. It does not where all are asked for (`keep=1` without a threshold), nor where a threshold
    drops nothing and only the device knows; `elimination.kept_tokens` tells.

    score="attention" calls `input_layernorm`, `q_proj` and `k_proj` (and the norms of queries and keys) once more, for
    all tokens, as in evaluation and without gradients. So forward hooks of these run twice in a call.

    Where processes train together (`torch.distributed` is initialized) a layer that keeps nothing computes for a row
    that only fills up, and its gradients are zeros instead of none: the others wait for them.

    A cache that a call in training fills lacks what was eliminated. Nothing may go on from it: a layer that is given it
    in another call raises RuntimeError.

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
        threshold: blocks with a smaller score are not kept either; a number, -inf to keep everything, or a floating
            scalar tensor.
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

    method = "token elimination"
    does = "eliminates tokens"
    cannot = "cannot eliminate tokens"

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
        anatomy = cls.checked_anatomy(module, options)
        index = getattr(module.get_submodule("self_attn"), "layer_idx", None)
        index = index if isinstance(index, int) else 0
        return cls.over(module, Sharing(options, index), anatomy, Selections(), index, predictor)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states `[B, T, H]` to `[B, T, H]`; the other arguments are those of the class that was taken over."""
        state = self.elimination
        inputs = state.named(args, kwargs)
        call = call_of(inputs)
        state.selections.short_caches.check(inputs.get("past_key_values"), call)
        if state.selections.suspended or (state.options.train_only and not self.training):
            state.remember(hidden_states, None)
            return self.own_forward(hidden_states, *args, **kwargs)
        if state.leader == state.index:
            state.selections.begin(call, state.index)
        reason = self._obstacle(hidden_states, inputs)
        if reason is not None:
            state.note_dense(reason)
            state.remember(hidden_states, None)
            return self.own_forward(hidden_states, *args, **kwargs)
        kept = state.select(self, hidden_states, inputs)
        state.remember(hidden_states, kept)
        half = state.options.apply_to
        y = self.attention_half(hidden_states, None if half == "mlp" else kept, inputs)
        return self.mlp_half(y, None if half == "attention" else kept, y is not hidden_states)

    def _obstacle(self, x: Tensor, inputs: dict[str, Any]) -> str | None:
        """Why this call has to be the class's own; None when it has not."""
        options = self.elimination.options
        reason = self.cache_obstacle(inputs)
        if reason is not None:
            return reason
        if options.apply_to == "mlp" and options.score != "attention":
            return None
        if inputs.get("position_embeddings") is None:
            return "it gets no position_embeddings, so that attention would count kept tokens"
        mask = inputs.get("attention_mask")
        reason = mask_obstacle(mask, x.shape[1])
        window = sliding_window(self.self_attn)
        if reason is None and isinstance(window, int) and window < x.shape[1] and (mask is None or mask.dim() != 4):
            reason = f"its sliding window of {window} tokens would count kept tokens"
        return reason

    def extra_repr(self) -> str:
        options = self.elimination.options
        threshold = "" if options.threshold is None else f", threshold={options.threshold}"
        return (
            f"keep={options.keep}, block_size={options.block_size}, score={options.score_name}, "
            f"apply_to={options.apply_to}{threshold}"
        )
