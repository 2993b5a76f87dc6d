"""`rho_loss`: the loss of transformers' causal language models on the tokens that a reference model finds easier."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from .. import ops
from ..ops.selective_loss import check_loss_ratio
from .causal_lm import before_the_head


def rho_loss(
    model: nn.Module,
    input_ids: Tensor | None,
    labels: Tensor,
    reference_losses: Tensor,
    ratio: float = 0.6,
    *,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    token_mask: Tensor | Literal["computed", "selected"] | None = None,
    chunk_size: int | None = None,
    **inputs: Any,
) -> Tensor:
    """`causal_lm_loss` of the tokens whose loss exceeds a reference model's most: selective language modeling, Rho-1.

    The decoder is called once. The losses of all tokens are formed from its hidden states without a gradient, then
    those of the chosen tokens with one; see `ops.selective_cross_entropy` for what that costs.

    Args:
        model, input_ids, ignore_index, chunk_size, **inputs: as for `causal_lm_loss`.
        labels: `[B, T]`, int64, as for `causal_lm_loss`.
        reference_losses: floating `[B, T]`, what `causal_lm_token_losses` gave for these tokens; on any device.
        ratio: share of the labels that count whose loss is taken, in (0, 1]; of the whole batch, rounded up.
        num_items_in_batch: what the sum is divided by in place of the number of chosen tokens.
        token_mask: as for `causal_lm_loss`; only labels that count may be chosen.

    Returns:
        A scalar, as that of `causal_lm_loss`.

    Raises:
        ValueError, TypeError: as `causal_lm_loss`, or reference_losses or ratio is off. Then nothing has run.

    Source: Lin et al., "Rho-1: Not All Tokens Are What You Need", NeurIPS 2024, section 2.2.
    """
    check_loss_ratio("rho_loss", ratio)
    if reference_losses.shape != labels.shape or not reference_losses.is_floating_point():
        dtype = str(reference_losses.dtype).removeprefix("torch.")
        raise ValueError(
            f"rho_loss: reference_losses must be floating {list(labels.shape)}, as labels, got {dtype} "
            f"{list(reference_losses.shape)}"
        )
    hidden, head, counted = before_the_head("rho_loss", model, input_ids, inputs, token_mask)
    return ops.selective_cross_entropy(
        hidden,
        head.weight,
        labels.to(hidden.device),
        reference_losses.to(hidden.device),
        ratio,
        head.bias,
        ignore_index=ignore_index,
        num_items_in_batch=num_items_in_batch,
        shift=True,
        token_mask=counted,
        chunk_size=chunk_size,
    )
