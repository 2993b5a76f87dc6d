"""The cross entropy of a language model's last layer without all of its logits: formed in chunks of rows.

The formula is in `peft_kernels/reference/cross_entropy.py`, the pass over the chunks with the autograd Function in
`cross_entropy_chunks.py`, which labels count in `counted_labels.py`; this file holds the checks, the fake kernel and
the registration. On a GPU nothing here waits for the device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..reference import cross_entropy as reference
from ..reference.lora import accumulation_dtype, as_rows
from ._autocast import autocast_dtype
from ._checks import FLOATING, describe, transforms_active
from ._register import register_operator
from .counted_labels import Counted, counted_labels
from .cross_entropy_chunks import Chunks, LinearCrossEntropyFunction

LOGITS_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}
"""What the logits of a chunk take, by device type, where the caller does not say how many rows it has."""

REDUCTIONS = ("mean", "sum", "none")


def _fake_rows(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=accumulation_dtype(logits.dtype))


register_operator(
    "cross_entropy_rows_",
    reference=reference.cross_entropy_rows_,
    fake=_fake_rows,
    cuda=True,
    triton="no Triton kernel yet",
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    shift: bool = False,
    token_mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    max_tokens: int | None = None,
    logit_softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """`cross_entropy(hidden weight^T + bias, labels)`, holding the logits of a chunk of rows at a time.

    Forward forms the gradients too, a chunk at a time, and backward only scales them. On the CPU rows without a label
    are left out of the products; on a GPU, where the host does not know them, and under `torch.compile` they are in
    them as rows of zeros, and change nothing. Compiled code is unrolled over the chunks, and compiled again for each
    other number of them: torch gives up after `torch._dynamo.config.recompile_limit`, eight. Where lengths vary that
    much, pad them to a few, or take a larger chunk_size. Inside `torch.func` transforms all logits are held at once.

    Args:
        hidden: `[..., H]`, the input of the last layer, seen as M rows; float32, bfloat16, float16 or float64.
        weight: `[V, H]` in hidden's dtype.
        labels: int64 with hidden's leading dimensions: in `[0, V)`, or `ignore_index`.
        bias: `[V]` in hidden's dtype, or None.
        ignore_index: the label of tokens that do not count.
        reduction: `"mean"` over the tokens that count (where there are none NaN with gradients of zero, as in torch),
            `"sum"`, or `"none"`, which has no gradient for weight and bias.
        num_items_in_batch: what `"mean"` divides by in place of the count, a number or a tensor of one: transformers'
            sum over the tokens of all accumulated batches.
        shift: hidden at token t predicts the label at t + 1, as in causal language models; hidden is not copied.
        token_mask: bool with labels' shape: only labels where it is true count.
        token_weights: floating, with labels' shape: factors of the labels' losses, without a gradient. `"mean"` divides
            by the sum of those that count, as torch does with weights of classes. A label of weight 0 does not count.
        max_tokens: at most so many labels count, where the caller knows: on a GPU and under `torch.compile` so many
            rows are in the products instead of all. More labels than that raise.
        logit_softcap: finite c of logits `c tanh(logits / c)`, or None. Takes the memory of a second chunk.
        chunk_size: rows per chunk; None takes as many as have 64 MiB of logits, or 256 MiB on a GPU.

    Returns:
        A scalar, or with `"none"` a loss per label, at the label's place (zero where it does not count; so with shift
        at the first), in float32, or float64 for float64. Under autocast hidden, weight and bias are cast first.

    Saved for backward: hidden's gradient, as many bytes as the rows that were computed, and the gradients of weight and
    bias if they train. In 16 bits gradients are rounded once before they are scaled and once after; that of weight is a
    float32 sum of the chunks' products, which are rounded each. In float16, whose range is too small for such sums, the
    gradients of weight and bias are float32 until they are scaled; on the CPU that takes the memory of two more chunks.

    Raises:
        ValueError, TypeError: an argument's value, shape, dtype or device is off; nothing has run. On a GPU a label out
            of range raises when the device comes to it, inside transforms when torch's own loss does.

    Source: Hsu et al., "Liger Kernel", 2024; Luo et al., "Mini-Sequence Transformers", 2024. Lin et al., "Rho-1",
    NeurIPS 2024, for token_mask.
    """
    dtype = autocast_dtype(hidden.device.type)
    if dtype is not None:
        if hidden.dtype in FLOATING and hidden.dtype != torch.float64:
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return linear_cross_entropy(
                hidden,
                weight,
                labels,
                bias,
                ignore_index=ignore_index,
                reduction=reduction,
                num_items_in_batch=num_items_in_batch,
                shift=shift,
                token_mask=token_mask,
                token_weights=token_weights,
                max_tokens=max_tokens,
                logit_softcap=logit_softcap,
                chunk_size=chunk_size,
            )
    _check_tensors(hidden, weight, labels, bias, token_mask, token_weights, shift)
    _check_options(reduction, num_items_in_batch, max_tokens, logit_softcap, chunk_size)
    _check_gradients(reduction, weight, bias, token_weights, num_items_in_batch)
    counted = counted_labels(
        labels,
        token_mask,
        token_weights,
        vocabulary=weight.shape[0],
        ignore_index=ignore_index,
        shift=shift,
        max_tokens=max_tokens,
        dtype=hidden.dtype,
    )
    if chunk_size is None:
        row_bytes = weight.shape[0] * weight.element_size()
        chunk_size = max(1, LOGITS_BYTES.get(hidden.device.type, LOGITS_BYTES["cuda"]) // row_bytes)
    rows = as_rows(hidden)
    if reduction == "none":
        losses = _losses(rows, weight, bias, counted, chunk_size, logit_softcap, None, False).view(labels.shape)
        return F.pad(losses[..., :-1], (1, 0)) if shift and labels.shape[-1] > 0 else losses
    if reduction == "sum":
        return _losses(rows, weight, bias, counted, chunk_size, logit_softcap, None, True)
    some, share = _share(counted, num_items_in_batch, accumulation_dtype(hidden.dtype))
    # Where nothing counts the share is 0 / 0: the value of the loss, but no factor of gradients, as 0 NaN is NaN.
    scale = torch.where(some, share, 0.0)
    loss = _losses(rows, weight, bias, counted, chunk_size, logit_softcap, scale, True)
    return torch.where(some, loss, share)


def _share(counted: Counted, items: int | Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Whether any label counts, and what share of the mean each has: 0 / items where none does."""
    labeled = counted.targets >= 0
    if items is None:
        items = labeled.sum() if counted.weights is None else counted.weights.sum()
    elif isinstance(items, Tensor):
        items = items.reshape(())
    some = labeled.any()
    return some, (some.to(dtype) / items).to(dtype)


def _losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counted: Counted,
    chunk_size: int,
    softcap: float | None,
    scale: Tensor | None,
    summed: bool,
) -> Tensor:
    if transforms_active():
        losses = reference.linear_cross_entropy(hidden, weight, bias, counted.targets, softcap)
        losses = losses if counted.weights is None else losses * counted.weights
        losses = losses.sum() if summed else losses
        return losses if scale is None else losses * scale
    backend = backends.forced_backend()
    if not torch.is_grad_enabled():
        needs = (False, False, False)
        return Chunks(hidden, weight, bias, counted, chunk_size, softcap, needs, backend).result(scale, summed)
    return LinearCrossEntropyFunction.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden, weight, bias, *counted, scale, chunk_size, softcap, summed, backend
    )


def _check_tensors(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    token_mask: Tensor | None,
    token_weights: Tensor | None,
    shift: bool,
) -> None:
    op = "linear_cross_entropy"
    if hidden.dim() < 1 or hidden.dtype not in FLOATING:
        raise TypeError(f"{op}: hidden must be [..., H], float32, bfloat16, float16 or float64, got {describe(hidden)}")
    if shift and hidden.dim() < 2:
        raise ValueError(f"{op}: hidden must be [..., T, H] with shift, got {describe(hidden)}")
    features = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != features or weight.shape[0] < 1:
        raise ValueError(f"{op}: weight must be [V >= 1, {features}], got {describe(weight)}")
    tokens = tuple(hidden.shape[:-1])
    others: dict[str, tuple[Tensor | None, tuple[torch.dtype, ...], tuple[int, ...]]] = {
        "weight": (weight, (hidden.dtype,), tuple(weight.shape)),
        "bias": (bias, (hidden.dtype,), (weight.shape[0],)),
        "labels": (labels, (torch.int64,), tokens),
        "token_mask": (token_mask, (torch.bool,), tokens),
        "token_weights": (token_weights, FLOATING, tokens),
    }
    for name, (tensor, dtypes, shape) in others.items():
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{op}: {name} must be {names}, got {describe(tensor)}")
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} must be {list(shape)}, got {describe(tensor)}")
        if tensor.device != hidden.device:
            raise ValueError(f"{op}: {name} must be on hidden's device, {hidden.device}, got {describe(tensor)}")


def _check_options(
    reduction: str,
    num_items_in_batch: int | Tensor | None,
    max_tokens: int | None,
    logit_softcap: float | None,
    chunk_size: int | None,
) -> None:
    op = "linear_cross_entropy"
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if num_items_in_batch is not None and reduction != "mean":
        raise ValueError(f'{op}: num_items_in_batch is for reduction "mean", got it with {reduction!r}')
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(f"{op}: num_items_in_batch must hold one number, got {describe(num_items_in_batch)}")
    else:
        _check_number(op, "num_items_in_batch", num_items_in_batch, (int, float))
    _check_number(op, "max_tokens", max_tokens, (int,))
    _check_number(op, "logit_softcap", logit_softcap, (int, float))
    _check_number(op, "chunk_size", chunk_size, (int,))
    if max_tokens is not None and max_tokens < 0:
        raise ValueError(f"{op}: max_tokens must not be negative, got {max_tokens}")
    if logit_softcap is not None and not 0.0 < logit_softcap < math.inf:  # written so that NaN fails
        raise ValueError(f"{op}: logit_softcap must be positive and finite, got {logit_softcap}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{op}: chunk_size must be at least 1 row, got {chunk_size}")


def _check_number(op: str, name: str, value: object, types: tuple[type, ...]) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (*types, torch.SymInt))):
        expected = "a number" if float in types else "an integer"
        raise TypeError(f"{op}: {name} must be {expected}, got {value!r}")


def _check_gradients(
    reduction: str,
    weight: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    num_items_in_batch: int | Tensor | None,
) -> None:
    op = "linear_cross_entropy"
    if not torch.is_grad_enabled():
        return
    if reduction == "none" and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(f'{op}: reduction "none" has no gradient for weight and bias, which ask for one')
    if token_weights is not None and token_weights.requires_grad:
        raise ValueError(f"{op}: token_weights have no gradient, but ask for one; give token_weights.detach()")
    if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.requires_grad:
        raise ValueError(f"{op}: num_items_in_batch has no gradient, but asks for one; give it detached")
