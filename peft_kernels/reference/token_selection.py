"""Which tokens are kept, in plain PyTorch: the definition of each operator that scores and selects them.

Tokens are taken by blocks of `block_size` neighbors. The informativeness of block b, from queries and keys,

    I(b) = sum over blocks a >= b of queries of  max over i in a, j in b, j <= i of  sum over heads of max(0, q_i . k_j)

Source: Wang et al., "LeMo: Enabling Less Token Involvement for More Context Fine-tuning", 2025 (JENGA, USENIX ATC
2025), sections 4.1 and 4.2: `I(j) = sum_i Q_i . K_j`, its positive part, reduced by blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lora import accumulation_dtype

_QUERIES = 1024
"""How many queries are scored at once, or as many as make a whole block."""


def block_scores(q: Tensor, k: Tensor, block_size: int, starts: Tensor | None) -> Tensor:
    """I(b) of every whole block of each sequence.

    Queries are taken in runs of whole blocks, heads one by one: of all pairs of tokens `[B, run, T]` are held at a
    time, since this also serves GPUs whose own kernels nobody has verified.

    Args:
        q: `[B, heads, T, D]`, any strides.
        k: `[B, key_value_heads, T, D]` in q's dtype; a head h of q goes with head `h // (heads / key_value_heads)`.
        block_size: tokens per block.
        starts: int32 `[B, T]`: token i sees keys from starts[i] to i, none if that lies behind i (so packed documents
            and padding are told apart); None means from 0.

    Returns:
        `[B, T // block_size]` in the accumulation dtype. Queries of an unfinished last block count, its keys do not.
    """
    batch, heads, tokens, _ = q.shape
    accumulate = accumulation_dtype(q.dtype)
    zero = torch.zeros((), dtype=accumulate, device=q.device)
    position = torch.arange(tokens, device=q.device)
    blocks, shared = tokens // block_size, heads // k.shape[1]
    total = torch.zeros(batch, blocks, dtype=accumulate, device=q.device)
    run = max(1, _QUERIES // block_size) * block_size
    for first in range(0, tokens, run):
        last = min(tokens, first + run)
        seen_blocks = min(blocks, last // block_size)  # whole blocks up to the last of these queries
        keys = seen_blocks * block_size
        scores = torch.zeros(batch, last - first, keys, dtype=accumulate, device=q.device)
        for head in range(heads):
            queries = q[:, head, first:last].to(accumulate)
            scores = scores + (queries @ k[:, head // shared, :keys].to(accumulate).mT).clamp(min=0)
        seen = position[None, None, :keys] <= position[None, first:last, None]
        if starts is not None:
            seen = seen & (position[None, None, :keys] >= starts[:, first:last, None])
        by_key = torch.where(seen, scores, zero).reshape(batch, last - first, seen_blocks, block_size).amax(-1)
        missing = -(last - first) % block_size
        by_key = torch.nn.functional.pad(by_key, (0, 0, 0, missing))  # no score is negative
        largest = by_key.reshape(batch, (last - first + missing) // block_size, block_size, seen_blocks).amax(2)
        total = total + torch.nn.functional.pad(largest.sum(1), (0, blocks - seen_blocks))
    return total


def select_tokens(
    scores: Tensor, tokens: int, blocks: int, block_size: int, threshold: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The tokens of the `blocks` blocks of each sequence with the largest scores, in order.

    An unfinished last block, `tokens % block_size` tokens, is kept in any case, so that the host knows the count. Of
    equal scores the earlier block is taken; a NaN is larger than any number, so that it is not hidden.

    Args:
        scores: `[B, tokens // block_size]`, float32 or float64.
        tokens: T, tokens of a sequence.
        blocks: how many to take, at most as many as there are.
        block_size: tokens per block.
        threshold: a scalar in scores' dtype: of those blocks only the ones whose score is at least as large are kept.

    Returns:
        positions int32 `[B, blocks * block_size + tokens % block_size]` in the sequence, sorted, then -1 up to the
        end; counts int32 `[B]`, how many are not -1.
    """
    total = tokens // block_size
    chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, :blocks]  # to sort, a NaN is the largest
    mask = torch.zeros(scores.shape[0], total, dtype=torch.bool, device=scores.device)
    mask.scatter_(1, chosen, True)
    if threshold is not None:
        mask &= (scores >= threshold) | scores.isnan()
    kept = mask.repeat_interleave(block_size, 1)
    tail = torch.ones(scores.shape[0], tokens - total * block_size, dtype=torch.bool, device=scores.device)
    kept = torch.cat((kept, tail), 1)
    positions = torch.arange(tokens, device=scores.device).expand(scores.shape[0], -1)
    size = blocks * block_size + tail.shape[1]
    ordered = torch.where(kept, positions, tokens).sort(1).values[:, :size]
    counts = kept.sum(1)
    return torch.where(ordered < tokens, ordered, -1).int(), counts.int()
