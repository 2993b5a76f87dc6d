"""The loss of transformers' causal language models without all of their logits: as a whole, and by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from .. import elimination, ops
from ..elimination.token_tune import selections_of
from ..nn.linear import has_hooks, replaced_call, type_name, weight_obstacle
from ..planning import unwrapped

_SCALES = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_mup_width_multiplier",
    "logits_scaling",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "output_multiplier",
)
"""Settings of configurations by which models change their logits."""
_OF_THE_HEAD = ("logits_to_keep", "return_dict", "shift_labels")


def causal_lm_loss(
    model: nn.Module,
    input_ids: Tensor | None,
    labels: Tensor,
    *,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    token_mask: Tensor | Literal["computed", "selected"] | None = None,
    token_weights: Tensor | None = None,
    chunk_size: int | None = None,
    **inputs: Any,
) -> Tensor:
    """`model(input_ids, labels=labels, ...).loss`, holding the logits of a chunk of tokens at a time.

    The decoder is called, then `ops.linear_cross_entropy` with its last hidden state and the weight of the output
    layer, neither the model's own forward nor that layer's. Adapters and token elimination in the decoder, activation
    checkpointing and autocast work as they do in the model.

    Args:
        model: a causal language model of transformers', or PEFT's `get_base_model()` of one; see
            `causal_lm_loss_obstacle`.
        input_ids: `[B, T]`, int64, or None with `inputs_embeds`.
        labels: `[B, T]`, int64, those of the tokens themselves, as the model takes them; each is predicted by the
            tokens before it.
        num_items_in_batch: what the sum is divided by in place of the number of labels.
        ignore_index: the label of tokens that do not count.
        token_mask: bool `[B, T]`: only labels where it is true count. Or, in training, those that are predicted by the
            tokens that this call has: "computed" in most of the layers that eliminate tokens, see
            `elimination.computed_labels`; "selected" for gradients, see `elimination.selected_labels`.
        token_weights: floating `[B, T]`, factors of the labels' losses; the loss is then divided by the sum of those
            that count, unless by num_items_in_batch. A label of weight 0 does not count.
        chunk_size: tokens per chunk; see `ops.linear_cross_entropy`.
        **inputs: what else the decoder is called with: attention_mask, position_ids, ...

    Returns:
        A scalar, float32 (float64 for float64). In 16 bits the products are rounded as the model rounds them, and
        summed up in another order.

    Raises:
        TypeError: an argument that is about the logits, which nobody gets here.
        ValueError: the model's loss is not this one; the message says why. Or token_mask is "computed" or "selected"
            and the model has no such layers. Or as `ops.linear_cross_entropy`.
    """
    hidden, head, counted = before_the_head("causal_lm_loss", model, input_ids, inputs, token_mask)
    return ops.linear_cross_entropy(
        hidden,
        head.weight,
        labels.to(hidden.device),
        head.bias,
        ignore_index=ignore_index,
        num_items_in_batch=num_items_in_batch,
        shift=True,
        token_mask=counted,
        token_weights=token_weights,
        chunk_size=chunk_size,
    )


@torch.no_grad()
def causal_lm_token_losses(
    model: nn.Module,
    input_ids: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    token_mask: Tensor | Literal["computed", "selected"] | None = None,
    chunk_size: int | None = None,
    **inputs: Any,
) -> Tensor:
    """The loss of each token, without a gradient: what `rho_loss` compares with, from a reference model.

    The reference may be another model with the same tokens, or the same one without its adapters: call this before
    `inject`, or for PEFT's with `peft_model.get_base_model()` inside `with peft_model.disable_adapter()`. A reference
    does not train, so that its losses can be computed once and stored beside the data.

    Args:
        model: as for `causal_lm_loss`, and left in its mode: call `eval()` first, so that neither dropout nor token
            elimination is in the losses.
        input_ids, labels, ignore_index, token_mask, chunk_size, **inputs: as for `causal_lm_loss`.

    Returns:
        `[B, T]`, float32 (float64 for float64): the loss of each label at the label's place; zero for labels that do
        not count, and for the first of a sequence, which nothing predicts.

    Raises:
        ValueError, TypeError: as `causal_lm_loss`.
    """
    hidden, head, counted = before_the_head("causal_lm_token_losses", model, input_ids, inputs, token_mask)
    return ops.linear_cross_entropy(
        hidden,
        head.weight,
        labels.to(hidden.device),
        head.bias,
        ignore_index=ignore_index,
        reduction="none",
        shift=True,
        token_mask=counted,
        chunk_size=chunk_size,
    )


def causal_lm_loss_obstacle(model: nn.Module) -> str | None:
    """Why `causal_lm_loss` is not the model's own loss; None when it is.

    It goes by the model's parts and its configuration: what a class of another library does to its logits is not seen.
    """
    if unwrapped(model) is not model:
        return "it is wrapped by torch.compile or DistributedDataParallel, whose work would be left out"
    if not isinstance(model, PreTrainedModel):
        hint = "; give its get_base_model()" if hasattr(model, "get_base_model") else ""
        return f"it is a {type_name(model)}, not a model of transformers{hint}"
    # The decoder is called instead of the model, and the head's weight instead of the head.
    reason = _call_obstacle(model)
    if reason is not None:
        return f"its forward would be left out, but {reason}"
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        found = "none" if head is None else f"a {type_name(head)}"
        return f"its output layer must be a plain nn.Linear, and it has {found}"
    reason = _call_obstacle(head)
    if reason is not None:
        return f"its output layer's forward would be left out, but {reason}"
    reason = weight_obstacle(head)
    if reason is not None:
        return f"its output layer cannot be read: {reason}"
    decoder = model.get_decoder()
    if decoder is model or decoder is not model.base_model:
        return "its decoder is not all that is before the output layer"
    return _loss_obstacle(model)


def before_the_head(
    caller: str, model: nn.Module, input_ids: Tensor | None, inputs: Mapping[str, Any], token_mask: Tensor | str | None
) -> tuple[Tensor, Any, Tensor | None]:
    """The decoder's last hidden state `[B, T, H]`, the output layer behind it, and which labels `[B, T]` count.

    `caller` is the loss that asks, `token_mask` as in `causal_lm_loss`.

    Raises:
        ValueError, TypeError: as `causal_lm_loss`; nothing has run.
    """
    reason = causal_lm_loss_obstacle(model)
    if reason is not None:
        raise ValueError(f"{caller} cannot take the place of this model's own loss: {reason}")
    for name in _OF_THE_HEAD:
        if name in inputs:
            raise TypeError(f"{caller} takes no {name}, which is for the model's own forward")
    masks: dict[str, Callable[[nn.Module], Tensor | None]] = {
        "computed": elimination.computed_labels,
        "selected": elimination.selected_labels,
    }
    if isinstance(token_mask, str):
        if token_mask not in masks:
            raise ValueError(f'token_mask must be bool [B, T], "computed", "selected" or None, got {token_mask!r}')
        if token_mask == "selected":
            selections_of(model)
        elif not elimination.eliminating_layers(model):
            raise ValueError("model has no layers that eliminate tokens")
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    hidden = decoder(input_ids=input_ids, **inputs).last_hidden_state
    return hidden, head, masks[token_mask](model) if isinstance(token_mask, str) else token_mask


def _call_obstacle(module: nn.Module) -> str | None:
    return "it has hooks" if has_hooks(module) else replaced_call(module)


def _loss_obstacle(model: PreTrainedModel) -> str | None:
    config = model.config
    for name in _SCALES:
        value = getattr(config, name, None)
        if value is not None and value != 1:
            return f"it changes its logits ({name}={value})"
    if getattr(config, "output_router_logits", False):
        return "it adds a loss of its routers (output_router_logits)"
    if model.loss_function is not ForCausalLMLoss:
        return f"its loss is {getattr(model.loss_function, '__name__', model.loss_function)}"
    return None
