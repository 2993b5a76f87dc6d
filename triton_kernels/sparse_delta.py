"""The sparse-delta family on Triton: the sampled product, the one operator of it with a GEMM inside.

Formulas and contracts are those of `peft_kernels/reference/sparse_delta.py`; float64 is not served. Sums are float32
and finished in a fixed order, as in `lora.py`; the functions trust their arguments, `LAUNCHERS` checks first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import common, sparse_delta_kernels
from .checks import checked
from .common import Tile, ceil_div

# Bytes per activation -> tile of dy^T x `[rows of it, columns]`; `inner` walks M. 16-bit operands use tensor cores.
# Taking entries out holds the tile in a second layout: 128 x 128 would spill.
_TILES = {
    2: Tile(128, 64, num_warps=8, num_stages=3, inner=64),
    4: Tile(64, 64, num_warps=8, num_stages=3, inner=16),
}
# Entries of a row of a tile that are taken out at once: a row of 64 has one or two at the usual densities.
_ENTRIES = 16


def _starts(indices: Tensor, N: int, K: int, width: int) -> Tensor:
    """The first entry at or behind column `t width` of every row, `[N, tiles + 1]`: a binary search each."""
    tiles = ceil_div(K, width)
    columns = (torch.arange(tiles + 1, device=indices.device) * width).clamp_(max=K)
    bounds = torch.arange(N, device=indices.device)[:, None] * K + columns
    # Behind the position before: a bound itself may be one more than an int32 can hold.
    return torch.searchsorted(indices, (bounds - 1).to(indices.dtype), right=True)


def sampled_product(grad_out: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """See `peft_kernels.reference.sparse_delta.sampled_product`."""
    (M, N), K, count = grad_out.shape, x.shape[1], indices.numel()
    out = torch.empty(count, dtype=dtype, device=x.device)
    if M == 0 or count == 0:
        return out.zero_()
    tile = _TILES[x.element_size()]
    row_tiles, column_tiles = ceil_div(N, tile.rows), ceil_div(K, tile.columns)
    chunk, splits = tile.splits(row_tiles * column_tiles, ceil_div(M, tile.inner))
    partial = out if splits == 1 else torch.empty((splits, count), dtype=torch.float32, device=x.device)
    common.launch(
        sparse_delta_kernels.sampled_product_kernel, (column_tiles, row_tiles, splits), x.device,
        grad_out, x, indices, _starts(indices, N, K, tile.columns), partial, M, N, K, count, column_tiles,
        *grad_out.stride(), *x.stride(), chunk,
        BLOCK_N=tile.rows, BLOCK_K=tile.columns, BLOCK_M=tile.inner, BLOCK_E=_ENTRIES, **tile.options(),
    )  # fmt: skip
    if splits > 1:
        common.sum_partials(partial, out)
    return out


LAUNCHERS: dict[str, Callable[..., Any]] = {sampled_product.__name__: checked(sampled_product)}
"""Operator name to launcher; each takes exactly the operator's arguments, positionally, and checks them first."""
