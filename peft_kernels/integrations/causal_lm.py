"""`causal_lm_loss`: the loss of transformers' causal language models without all of their logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from .. import ops
from ..elimination import computed_labels
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
    token_mask: Tensor | None = None,
    least_computed: float | None = None,
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
        token_mask: bool `[B, T]`: only labels where it is true count.
        least_computed: for a model that eliminates tokens: only labels count whose predicting token was computed by so
            many layers; see `elimination.computed_labels`.
        chunk_size: tokens per chunk; see `ops.linear_cross_entropy`.
        **inputs: what else the decoder is called with: attention_mask, position_ids, ...

    Returns:
        A scalar, float32 (float64 for float64). In 16 bits the products are rounded as the model rounds them, and
        summed up in another order.

    Raises:
        TypeError: an argument that is about the logits, which nobody gets here.
        ValueError: the model's loss is not this one; the message says why. Or as `ops.linear_cross_entropy` or
            `elimination.computed_labels`.
    """
    reason = causal_lm_loss_obstacle(model)
    if reason is not None:
        raise ValueError(f"causal_lm_loss cannot take the place of this model's own loss: {reason}")
    for name in _OF_THE_HEAD:
        if name in inputs:
            raise TypeError(f"causal_lm_loss takes no {name}, which is for the model's own forward")
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    hidden = decoder(input_ids=input_ids, **inputs).last_hidden_state
    if least_computed is not None:
        labels = computed_labels(model, labels, least_computed, ignore_index)
    return ops.linear_cross_entropy(
        hidden,
        head.weight,
        labels.to(hidden.device),
        head.bias,
        ignore_index=ignore_index,
        num_items_in_batch=num_items_in_batch,
        shift=True,
        token_mask=token_mask,
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
