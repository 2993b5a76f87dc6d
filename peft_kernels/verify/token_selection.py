"""Inputs for the scores and the selection of tokens: heads in groups, packed documents, ties, unfinished blocks.

Letters as in `peft_kernels/reference/token_selection.py`: B sequences of T tokens, heads of D numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..reference.lora import accumulation_dtype
from .case import Case

_HEADS = ((2, 2, 1, 9, 8, 4), (1, 1, 1, 1, 1, 1), (2, 4, 2, 70, 33, 16), (1, 9, 3, 257, 64, 64))
"""B, heads, key_value_heads, T, D, block_size."""
_SELECTIONS = ((0, 9, 1, 4), (2, 5, 0, 64), (3, 70, 5, 7), (2, 4100, 20, 64))  # B, T, blocks, block_size


def _block_scores(dtype: torch.dtype) -> Iterator[Case]:
    for seed, (batch, heads, groups, tokens, depth, block_size) in enumerate(_HEADS):
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn((batch, heads, tokens, depth), generator=generator, dtype=torch.float64).to(dtype)
        k = torch.randn((batch, groups, tokens, depth), generator=generator, dtype=torch.float64).to(dtype)
        packed = (torch.arange(tokens) // 23 * 23).int().expand(batch, -1).contiguous()
        for starts in (None, packed):
            name = f"B={batch} heads={heads}/{groups} T={tokens} D={depth}" + (" packed" if starts is not None else "")
            yield Case(name, (q, k, block_size, starts))


def _select_tokens(dtype: torch.dtype) -> Iterator[Case]:
    # Small integers: equal scores, and the same ones in every dtype, so that every position is decided.
    wide = accumulation_dtype(dtype)
    for seed, (batch, tokens, blocks, block_size) in enumerate(_SELECTIONS):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randint(0, 6, (batch, tokens // block_size), generator=generator).to(wide)
        for threshold in (None, torch.tensor(4.0, dtype=wide)):
            name = f"B={batch} T={tokens}, {blocks} blocks" + (" above a threshold" if threshold is not None else "")
            yield Case(name, (scores, tokens, blocks, block_size, threshold))


_CASES: dict[str, Callable[[torch.dtype], Iterator[Case]]] = {
    "block_scores": _block_scores,
    "select_tokens": _select_tokens,
}

OPERATORS = tuple(_CASES)


def cases(operator: str, dtype: torch.dtype) -> Iterator[Case]:
    """The calls that `operator` is checked on with queries and keys of `dtype`, or scores in the dtype of its sums."""
    yield from _CASES[operator](dtype)
