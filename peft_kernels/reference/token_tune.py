"""Gradients for selected tokens alone, in plain PyTorch: their rows beside the others', and attention of all.

M = B T rows of a batch, of which S are selected and the other U = M - S are not, as many in each of the B sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def merge_rows(selected: Tensor, others: Tensor, rows: Tensor, other_rows: Tensor) -> Tensor:
    """`y[rows] = selected; y[other_rows] = others`, with a gradient for selected alone.

    Args:
        selected: `[S, ...]`.
        others: `[U, ...]`, in selected's dtype.
        rows, other_rows: `[S]` and `[U]`, int32; together every row of the result, once.

    Returns:
        `[M, ...]`.
    """
    merged = selected.new_empty(selected.shape[0] + others.shape[0], *selected.shape[1:])
    merged[other_rows.long()] = others.detach()
    merged[rows.long()] = selected
    return merged


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """`softmax(scaling q k^T + mask) v`, causal where there is no mask.

    Args:
        q: `[B, heads, S, D]`.
        k, v: `[B, key_value_heads, T, D]`; head h of q goes with head `h // (heads / key_value_heads)`.
        mask: `[B or 1, heads or 1, S, T]`, bool or to be added; None, where S is T, for causal attention.
        scaling: None is `1 / sqrt(D)`.
        dropout_p: of the weights.

    Returns:
        `[B, heads, S, D]`.
    """
    groups = q.shape[1] // k.shape[1]
    if mask is not None and groups > 1:  # there kernels for grouped heads take no mask
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=mask is None and groups > 1,
    )


def heads_first(rows: Tensor, batch: int) -> Tensor:
    """Rows `[B * T, heads, D]` as attention takes them, `[B, heads, T, D]`; a view."""
    return rows.unflatten(0, (batch, -1)).transpose(1, 2)


def tokens_first(attended: Tensor) -> Tensor:
    """`[B, heads, T, D]` as rows `[B * T, heads * D]`."""
    return attended.transpose(1, 2).flatten(2).flatten(0, 1)


def visible_to(rows: Tensor, batch: int, tokens: int, mask: Tensor | None) -> Tensor:
    """What of all T tokens those in rows see: a mask `[B or 1, heads or 1, T, T]` at these rows.

    Args:
        rows: `[S]`, int32, as many for each sequence.
        batch: B.
        tokens: T.
        mask: of all tokens; None for causal attention.

    Returns:
        `[B, heads or 1, S / B, T]` in mask's dtype, bool for None.
    """
    first = torch.arange(batch, device=rows.device)[:, None] * tokens
    positions = rows.view(batch, -1).long() - first
    if mask is None:
        return (torch.arange(tokens, device=rows.device) <= positions[:, :, None])[:, None]
    return torch.take_along_dim(mask.expand(batch, -1, -1, -1), positions[:, None, :, None], dim=2)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    other_q: Tensor,
    other_k: Tensor,
    other_v: Tensor,
    rows: Tensor,
    other_rows: Tensor,
    batch: int,
    mask: Tensor | None,
    scaling: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of all tokens over all tokens, with gradients for selected ones alone.

    Queries, keys and values of the others get no gradient, and what comes out for the others gives none.

    Args:
        q, k, v: `[S, heads, D]`, k and v with `key_value_heads`.
        other_q, other_k, other_v: `[U, heads, D]`.
        rows, other_rows: as in `merge_rows`.
        batch: B.
        mask: `[B or 1, heads or 1, T, T]`, or None for causal attention.
        scaling: as in `attention`.

    Returns:
        `[S, heads * D]` for selected tokens, `[U, heads * D]` for the others.

    Source: Simoulin et al., "Memory-Efficient Fine-Tuning of Transformers via Token Selection", EMNLP 2024, section
    3.2.
    """
    every_q, every_k, every_v = (
        heads_first(merge_rows(mine, others, rows, other_rows), batch)
        for mine, others in ((q, other_q), (k, other_k), (v, other_v))
    )
    attended = tokens_first(attention(every_q, every_k, every_v, mask, scaling))
    return attended[rows.long()], attended.detach()[other_rows.long()]
