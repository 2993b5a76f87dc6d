"""Which labels count in a loss, with what weights, and which rows are computed for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.lora import accumulation_dtype
from ._checks import transforms_active


class Counted(NamedTuple):
    """The S rows of hidden `[M, H]` that are computed.

    Attributes:
        targets: int64 `[S]`, their labels; negative where there is none, though the row is computed.
        rows: int64 `[S]`, which of the M rows they are; None for all of them.
        weights: `[S]` in the accumulation dtype, the factors of their losses, zero where there is no label; None for
            ones.
    """

    targets: Tensor
    rows: Tensor | None
    weights: Tensor | None


def counted_labels(
    labels: Tensor,
    token_mask: Tensor | None,
    token_weights: Tensor | None,
    *,
    vocabulary: int,
    ignore_index: int,
    shift: bool,
    max_tokens: int | None,
    dtype: torch.dtype,
) -> Counted:
    """What counts of labels of any shape, for hidden in `dtype`; arguments are those of `linear_cross_entropy`.

    Raises:
        ValueError: a label is out of range, or more than max_tokens count; found only where the host reads at no cost,
            else the device raises, and inside transforms the loss of such a label does.
    """
    if shift and labels.shape[-1] > 0:
        labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
        token_mask = None if token_mask is None else F.pad(token_mask[..., 1:], (0, 1), value=False)
        token_weights = None if token_weights is None else F.pad(token_weights[..., 1:], (0, 1))
    counts = labels != ignore_index
    labels = _in_range(labels, counts, vocabulary, ignore_index)
    if token_mask is not None:
        counts = counts & token_mask
    weights = None
    if token_weights is not None:
        counts = counts & (token_weights != 0)
        weights = torch.where(counts, token_weights.to(accumulation_dtype(dtype)), 0.0).flatten()
    targets = torch.where(counts, labels, -1).flatten()
    rows = _computed_rows(targets, max_tokens)
    if rows is None:
        return Counted(targets, None, weights)
    return Counted(targets.index_select(0, rows), rows, None if weights is None else weights.index_select(0, rows))


def host_reads(tensor: Tensor) -> bool:
    """Whether the host can look at the tensor at no cost."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not transforms_active()


def _in_range(labels: Tensor, counts: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    wrong = counts & ((labels < 0) | (labels >= vocabulary))
    expected = f"linear_cross_entropy: labels must be in [0, {vocabulary}) or {ignore_index}"
    if transforms_active():
        # Not every transform can take an assertion; torch's loss refuses labels above the range.
        return torch.where(wrong, vocabulary, labels)
    if host_reads(labels):
        if bool(wrong.any()):
            raise ValueError(f"{expected}, got {int(labels[wrong][0])}")
    else:
        torch._assert_async(~wrong.any(), expected)
    return labels


def _computed_rows(targets: Tensor, max_tokens: int | None) -> Tensor | None:
    """The rows to compute, in order; None for all.

    Those with a label, where the host may ask which. Else `max_tokens` rows, first those with a label: their number is
    known beforehand.
    """
    if host_reads(targets):
        rows = (targets >= 0).nonzero().flatten()
        if max_tokens is not None and rows.shape[0] > max_tokens:
            raise ValueError(
                "linear_cross_entropy: max_tokens must be at least the number of labels that count, "
                f"{rows.shape[0]}, got {max_tokens}"
            )
        return None if rows.shape[0] == targets.shape[0] else rows
    if max_tokens is None or max_tokens >= targets.shape[0] or transforms_active():
        return None
    torch._assert_async(
        (targets >= 0).sum() <= max_tokens,
        f"linear_cross_entropy: max_tokens must be at least the number of labels that count, got {max_tokens}",
    )
    return (targets < 0).byte().argsort(stable=True)[:max_tokens]
