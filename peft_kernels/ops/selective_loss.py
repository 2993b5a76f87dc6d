"""Selective language modeling: the loss on the tokens that a model still has to learn, chosen by their excess loss.

    excess(x) = loss(x) - reference_loss(x)
    loss      = the mean of loss(x) over the ceil(ratio n) of n tokens with the largest excess

Nothing here waits for the device: how many tokens are chosen at most follows from the shape.

Source: Lin et al., "Rho-1: Not All Tokens Are What You Need", NeurIPS 2024, section 2.2, equations 3 to 5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._autocast import autocast_dtype
from ._checks import FLOATING, describe
from .cross_entropy import linear_cross_entropy

_SLACK = 1e-9
"""Of a count: 0.7 of 10 are 7, though the product lies above it."""


def select_excess_tokens(
    losses: Tensor,
    reference_losses: Tensor,
    ratio: float,
    labels: Tensor | None = None,
    *,
    ignore_index: int = -100,
    shift: bool = False,
    token_mask: Tensor | None = None,
) -> Tensor:
    """The tokens whose loss exceeds that of a reference model most.

    Of all n tokens that count, in all sequences together, the `ceil(ratio n)` with the largest
    `losses - reference_losses` are chosen. Of equal ones the earlier is taken, the sequences one after the other; a NaN
    is larger than any number, so that it is not hidden.

    Args:
        losses: any shape, a loss per token; float32, bfloat16, float16 or float64.
        reference_losses: the same of a reference model, in any of these dtypes.
        ratio: in [0, 1].
        labels: int64 with losses' shape: tokens with the label `ignore_index` do not count. None: all count.
        ignore_index: see labels.
        shift: the first token of a sequence does not count either, which nothing predicts.
        token_mask: bool with losses' shape: only tokens where it is true count.

    Returns:
        bool with losses' shape, as `linear_cross_entropy` takes it for token_mask. Excess is formed in float32, or
        float64 where one of the losses is.

    No gradient, and nothing is saved.

    Raises:
        ValueError, TypeError: an argument's value, shape, dtype or device is off; nothing has run.
    """
    op = "select_excess_tokens"
    _check_ratio(op, ratio)
    if losses.dtype not in FLOATING:
        raise TypeError(f"{op}: losses must be float32, bfloat16, float16 or float64, got {describe(losses)}")
    _check_like(op, "losses", losses, "reference_losses", reference_losses, FLOATING)
    _check_like(op, "losses", losses, "labels", labels, (torch.int64,))
    _check_like(op, "losses", losses, "token_mask", token_mask, (torch.bool,))
    counts = torch.ones_like(losses, dtype=torch.bool) if labels is None else labels != ignore_index
    if token_mask is not None:
        counts = counts & token_mask
    if shift and counts.dim() > 0:
        counts[..., :1] = False
    wide = torch.promote_types(torch.promote_types(losses.dtype, reference_losses.dtype), torch.float32)
    excess = losses.detach().to(wide) - reference_losses.detach().to(wide)
    # What does not count ranks behind everything else, an excess of minus infinity included.
    ranked = torch.where(counts, excess.clamp(min=torch.finfo(wide).min), -math.inf).flatten()
    order = ranked.sort(descending=True, stable=True).indices  # to sort, a NaN is the largest
    number = counts.sum().double()
    chosen = (number * ratio - number * _SLACK).ceil().clamp(max=most_selected(losses.numel(), ratio))
    taken = torch.arange(order.shape[0], device=order.device) < chosen
    return torch.zeros_like(taken).scatter_(0, order, taken).view(losses.shape)


def most_selected(tokens: int, ratio: float) -> int:
    """How many of so many tokens `select_excess_tokens` chooses at most: when all of them count."""
    return math.ceil(tokens * ratio - tokens * _SLACK)


def selective_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reference_losses: Tensor,
    ratio: float = 0.6,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    num_items_in_batch: int | Tensor | None = None,
    shift: bool = False,
    token_mask: Tensor | None = None,
    logit_softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """`linear_cross_entropy` of the tokens whose loss exceeds reference_losses most, as `select_excess_tokens` has it.

    Two passes over hidden, each with the logits of a chunk of rows at a time: the losses of all tokens, without a
    gradient, then loss and gradient of the chosen ones alone. In products of hidden and weight that is 1 + 2 ratio in
    place of 2, or 1 + 3 ratio in place of 3 where weight trains: the gain is in what is learned from.

    Args:
        hidden, weight, labels, bias, ignore_index, shift, logit_softcap, chunk_size: see `linear_cross_entropy`.
        reference_losses: floating, with labels' shape, the reference model's loss of each label at the label's place:
            `linear_cross_entropy` with reduction `"none"` has them so.
        ratio: share of the tokens that count whose loss is taken, in (0, 1]; of all sequences together, rounded up.
        num_items_in_batch: what the sum is divided by in place of the number of chosen tokens.
        token_mask: bool with labels' shape: only labels where it is true count, and may be chosen.

    Returns:
        A scalar, as that of `linear_cross_entropy`; NaN where no label counts.

    Saved for backward: hidden's gradient at the chosen rows, and the gradients of weight and bias if they train.

    Raises:
        ValueError, TypeError: an argument's value, shape, dtype or device is off; nothing has run.

    Source: Lin et al., "Rho-1", NeurIPS 2024, section 2.2.
    """
    op = "selective_cross_entropy"
    check_loss_ratio(op, ratio)
    _check_like(op, "labels", labels, "reference_losses", reference_losses, FLOATING)
    dtype = autocast_dtype(hidden.device.type)
    if dtype is not None and hidden.dtype in FLOATING and hidden.dtype != torch.float64:
        # Once for both passes; hidden and weight in this dtype are left as they are from here on.
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.no_grad():
        losses = linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias,
            ignore_index=ignore_index,
            reduction="none",
            shift=shift,
            token_mask=token_mask,
            logit_softcap=logit_softcap,
            chunk_size=chunk_size,
        )
    selected = select_excess_tokens(
        losses, reference_losses, ratio, labels, ignore_index=ignore_index, shift=shift, token_mask=token_mask
    )
    return linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias,
        ignore_index=ignore_index,
        num_items_in_batch=num_items_in_batch,
        shift=shift,
        token_mask=selected,
        max_tokens=most_selected(labels.numel(), ratio),
        logit_softcap=logit_softcap,
        chunk_size=chunk_size,
    )


def check_loss_ratio(op: str, ratio: float) -> None:
    """Raises unless `ratio` chooses some tokens.

    Raises:
        ValueError, TypeError: it is no number in (0, 1].
    """
    _check_ratio(op, ratio)
    if ratio == 0.0:
        raise ValueError(f"{op}: ratio must be in (0, 1], got {ratio}, which leaves no token to learn from")


def _check_ratio(op: str, ratio: float) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"{op}: ratio must be a number, got {ratio!r}")
    if not 0.0 <= ratio <= 1.0:  # written so that NaN fails
        raise ValueError(f"{op}: ratio must be in [0, 1], got {ratio}")


def _check_like(
    op: str, whose: str, model: Tensor, name: str, tensor: Tensor | None, dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor is None:
        return
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {names}, got {describe(tensor)}")
    if tensor.shape != model.shape:
        raise ValueError(f"{op}: {name} must be {list(model.shape)}, as {whose}, got {describe(tensor)}")
    if tensor.device != model.device:
        raise ValueError(f"{op}: {name} must be on {whose}' device, {model.device}, got {describe(tensor)}")
