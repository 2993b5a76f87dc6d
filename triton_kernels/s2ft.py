"""The S2FT family on Triton: the gradient of a slice of channels, and the gather of columns.

Formulas and contracts are those of `peft_kernels/reference/s2ft.py`; float64 is not served. Sums are float32, cut over
M and finished in a fixed order, as in `lora.py`; the functions trust their arguments, `LAUNCHERS` checks first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import common, s2ft_kernels, slice_checks
from .checks import checked
from .common import Tile, ceil_div, padded

# Bytes per activation -> tile of the result, `[the wide operand's columns, at most these of the narrow one]`; `inner`
# walks M. The wide side is the one that Hopper's matrix instruction wants 64 of. Float32 runs on scalar units, where
# long inner steps spill.
_TILES = {
    2: Tile(128, 128, num_warps=8, num_stages=3, inner=64),
    4: Tile(64, 64, num_warps=8, num_stages=3, inner=16),
}
_GATHER = Tile(16, 128, num_warps=4, num_stages=1)
# Every tile of the wide operand's columns reads all of the narrow one. Up to this many of them it is read as it is, its
# channels gathered in the load; beyond, once into a copy with rows of a multiple of _PITCH elements, which can be read
# 16 bytes at a time. At 8192 tokens, 4096 columns and 430 of the other operand's channels, each in a sector of 32 bytes
# of its own, 32 tiles would draw 3.6 GB through L2; the copy reads 113 MB and writes 7.
_TILES_WITHOUT_COPY = 2
_PITCH = 16


def _gathered(x: Tensor, indices: Tensor | None, pitch: int) -> Tensor:
    """`x[:, indices]`, or x, contiguous with zeros behind: `[M, pitch]`."""
    M, count = x.shape[0], x.shape[1] if indices is None else indices.shape[0]
    out = torch.empty((M, pitch), dtype=x.dtype, device=x.device)
    common.launch(
        s2ft_kernels.gather_columns_kernel, (ceil_div(M, _GATHER.rows), ceil_div(pitch, _GATHER.columns)), x.device,
        x, indices, out, M, count, pitch, *x.stride(),
        GATHER=indices is not None, BLOCK_M=_GATHER.rows, BLOCK_S=_GATHER.columns, **_GATHER.options(),
    )  # fmt: skip
    return out


def _reads_wide(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(0) % _PITCH == 0 and x.shape[1] % _PITCH == 0


def gather_columns(x: Tensor, indices: Tensor) -> Tensor:
    """See `peft_kernels.reference.s2ft.gather_columns`."""
    return _gathered(x, indices, indices.shape[0])


def slice_grad(grad_out: Tensor, x: Tensor, indices: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `peft_kernels.reference.s2ft.slice_grad`."""
    M, columns = x.shape
    rows = grad_out.shape[1] if indices is None else indices.shape[0]
    out = torch.empty((rows, columns), dtype=dtype, device=x.device)
    # The wide operand to the left; where one is gathered, it is the other one, few channels of many.
    if indices is None and rows >= columns:
        left, right, count, strides = grad_out, x, columns, (columns, 1)
    else:
        left, right, count, strides = x, grad_out, rows, (1, columns)
    tile = _TILES[x.element_size()]
    left_tiles = ceil_div(left.shape[1], tile.rows)
    if left_tiles > _TILES_WITHOUT_COPY and (indices is not None or not _reads_wide(right)):
        right, indices = _gathered(right, indices, ceil_div(count, _PITCH) * _PITCH), None
    width = count if indices is not None else right.shape[1]
    block = padded(width, 16, tile.columns)
    right_tiles = ceil_div(width, block)
    chunk, splits = tile.splits(left_tiles * right_tiles, ceil_div(M, tile.inner))
    partial = out if splits == 1 else torch.empty((splits, rows, columns), dtype=torch.float32, device=x.device)
    common.launch(
        s2ft_kernels.slice_grad_kernel, (right_tiles, left_tiles, splits), x.device,
        left, right, indices, partial, M, left.shape[1], width, count,
        *left.stride(), *right.stride(), *strides, chunk,
        GATHER=indices is not None, BLOCK_L=tile.rows, BLOCK_R=block, BLOCK_M=tile.inner, **tile.options(),
    )  # fmt: skip
    if splits > 1:
        common.sum_partials(partial, out)
    return out


LAUNCHERS: dict[str, Callable[..., Any]] = {
    launcher.__name__: checked(launcher, slice_checks.CHECKS) for launcher in (gather_columns, slice_grad)
}
"""Operator name to launcher; each takes exactly the operator's arguments, positionally, and checks them first."""
