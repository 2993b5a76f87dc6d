"""Scores of blocks of tokens on Triton, from queries and keys without the `[T, T]` matrix.

The formula is that of `peft_kernels/reference/token_selection.py`; float64 is not served. Maxima do not depend on their
order; sums over blocks of queries are float32, one per tile and finished in a fixed order, as in `lora.py`. The
function trusts its arguments, `LAUNCHERS` checks first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import common, token_checks, token_selection_kernels
from .checks import checked
from .common import Tile, ceil_div, padded

# Tiles [queries, keys]; `inner` is the most of D that is taken at once. Keys, which several heads share, are the wide
# side; 128 x 128 would not leave room in registers for the scores of a head beside their sum. Nor would, on Ampere,
# where operands take registers too, keys of more than 64 channels.
_HOPPER = Tile(64, 128, num_warps=8, num_stages=4, inner=128)
_AMPERE = Tile(64, 128, num_warps=8, num_stages=3, inner=64)
# Float32 runs on scalar units, where long inner steps and stages spill.
_FLOAT32 = Tile(64, 64, num_warps=8, num_stages=1, inner=16)
# The shortest run of tokens that is worth a tile of several blocks.
_LEAST_RUN = 16
_KIB = 1024


def _tile(q: Tensor) -> Tile:
    if q.element_size() == 4:
        return _FLOAT32
    return _HOPPER if common.shared_memory(q.device) >= 200 * _KIB else _AMPERE


def _run(block_size: int, largest: int) -> int:
    """Neighboring tokens that a tile takes of a block, a power of two.

    One that divides the block leaves no place empty; where it would be short, the block is filled up instead.
    """
    divisor = min(block_size & -block_size, largest)
    return divisor if divisor >= _LEAST_RUN else padded(block_size, 1, largest)


def block_scores(q: Tensor, k: Tensor, block_size: int, starts: Tensor | None) -> Tensor:
    """See `peft_kernels.reference.token_selection.block_scores`.

    Scratch: 4 bytes per tile of queries and block of keys, B T^2 / (16 block_size) bytes at tiles of 64.
    """
    (batch, heads, T, D), key_heads = q.shape, k.shape[1]
    blocks = T // block_size
    out = torch.empty((batch, blocks), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    tile = _tile(q)
    slots = _run(block_size, min(tile.rows, tile.columns))
    block_d = padded(D, 16, tile.inner)
    key_tiles = ceil_div(blocks, tile.columns // slots)
    query_tiles = ceil_div(ceil_div(T, block_size), tile.rows // slots)
    shape = (query_tiles, batch, blocks)
    partial = out if query_tiles == 1 else torch.empty(shape, dtype=torch.float32, device=q.device)
    common.launch(
        token_selection_kernels.block_scores_kernel, (query_tiles * key_tiles, batch), q.device,
        q, k, None if starts is None else starts.contiguous(), partial, batch, T, blocks, block_size, key_heads, D,
        *q.stride(), *k.stride(),
        GROUP=heads // key_heads, WHOLE=block_d >= D, PARTS=ceil_div(block_size, slots),
        SLOTS=slots, BLOCK_Q=tile.rows, BLOCK_K=tile.columns, BLOCK_D=block_d, GROUP_Q=16, **tile.options(),
    )  # fmt: skip
    if query_tiles > 1:
        common.sum_partials(partial, out)
    return out


LAUNCHERS: dict[str, Callable[..., Any]] = {block_scores.__name__: checked(block_scores, token_checks.CHECKS)}
"""Operator name to launcher; each takes exactly the operator's arguments, positionally, and checks them first."""
