"""The token-elimination family on Triton: a linear layer on some rows, gathered in the load of its product.

Formulas and contracts are those of `peft_kernels/reference/token_elimination.py`; float64 is not served. Sums are
float32 in one order, as in `lora.py`; the functions trust their arguments, `LAUNCHERS` checks first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import common, token_checks, token_elimination_kernels
from .checks import checked
from .common import Tile, ceil_div

# Rows that are moved: 8 KiB per program in 16 bits, 16 bytes of each of 4 rows per thread.
_MOVE = Tile(4, 1024, num_warps=4, num_stages=1)
# The product's tiles, as in `lora.py`: two warpgroups on 128 x 256 where a block has 144 KiB and the grid still fills
# an H100; 128 x 128 elsewhere; few rows.
_LARGE = Tile(128, 256, num_warps=8, num_stages=3, inner=64)
_MEDIUM = Tile(128, 128, num_warps=8, num_stages=3, inner=64)
_FLAT = Tile(64, 64, num_warps=4, num_stages=4, inner=64)
# Float32 runs on scalar units, where long inner steps spill.
_FLOAT32 = Tile(64, 64, num_warps=8, num_stages=3, inner=16)
# Dtypes whose product is ours: see `lora.py`.
_FUSED_DTYPES = (torch.bfloat16, torch.float16)
_KIB = 1024


def _tile(x: Tensor, S: int, N: int) -> Tile:
    if x.dtype not in _FUSED_DTYPES:
        return _FLOAT32
    if S <= 64:
        return _FLAT
    fills = ceil_div(S, _LARGE.rows) * ceil_div(N, _LARGE.columns) >= 132
    return _LARGE if fills and common.shared_memory(x.device) >= 200 * _KIB else _MEDIUM


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """See `peft_kernels.reference.token_elimination.gather_rows`."""
    S, C = rows.shape[0], x.shape[1]
    out = torch.empty((S, C), dtype=x.dtype, device=x.device)
    common.launch(
        token_elimination_kernels.gather_rows_kernel, (ceil_div(S, _MOVE.rows), ceil_div(C, _MOVE.columns)), x.device,
        x, rows.contiguous(), out, S, C, *x.stride(), BLOCK_S=_MOVE.rows, BLOCK_C=_MOVE.columns, **_MOVE.options(),
    )  # fmt: skip
    return out


def scatter_add_rows_(out: Tensor, values: Tensor, rows: Tensor) -> None:
    """See `peft_kernels.reference.token_elimination.scatter_add_rows_`."""
    S, C = values.shape
    common.launch(
        token_elimination_kernels.scatter_add_rows_kernel, (ceil_div(S, _MOVE.rows), ceil_div(C, _MOVE.columns)),
        out.device, out, values, rows.contiguous(), S, C, *out.stride(), *values.stride(),
        BLOCK_S=_MOVE.rows, BLOCK_C=_MOVE.columns, **_MOVE.options(),
    )  # fmt: skip


def scatter_add_rows(residual: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """See `peft_kernels.reference.token_elimination.scatter_add_rows`."""
    out = residual.clone(memory_format=torch.contiguous_format)
    scatter_add_rows_(out, values, rows)
    return out


def gather_linear_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    residual: Tensor | None,
    gather: bool,
    transposed: bool,
) -> Tensor:
    """See `peft_kernels.reference.token_elimination.gather_linear_scatter`.

    Behind a copy of residual `gather_linear_scatter_`; without residual the same product, stored where it is.

    The copy moves 2 e M N bytes, which in place nobody does: calculated for an H100 at 3.35 TB/s, 0.08 ms beside the
    product's 0.28 at M = 16384, half of the rows kept, K = N = 4096. Programs could copy dropped rows while others
    multiply; that takes a map from rows to entries, since entries that stand for no row rule out a binary search.
    """
    if residual is not None:
        out = residual.clone(memory_format=torch.contiguous_format)
        gather_linear_scatter_(out, x, weight, bias, rows, gather, transposed)
        return out
    if x.dtype in _FUSED_DTYPES:
        return fused_gather_linear_scatter(x, weight, bias, rows, residual, gather, transposed)
    y = _library_product(x, weight, bias, rows, gather, transposed)
    return torch.where((rows >= 0)[:, None], y, 0.0)


def gather_linear_scatter_(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, gather: bool, transposed: bool
) -> None:
    """See `peft_kernels.reference.token_elimination.gather_linear_scatter_`.

    One fused kernel; in float32 the library's product between our gather and our scatter.

    What bounds it, calculated for an H100 (989 TFLOP/s in 16 bits): the product's time goes with the kept rows down to
    about 267 of them, where reading weight takes as long as the FLOPs do. The gather in the load adds 4 bytes per row
    and tile of columns and saves the 2 e S K bytes of a copy of x[rows]; rows that are dropped cost nothing.
    """
    if x.dtype in _FUSED_DTYPES:
        fused_gather_linear_scatter_(out, x, weight, bias, rows, gather, transposed)
    else:
        scatter_add_rows_(out, _library_product(x, weight, bias, rows, gather, transposed), rows)


def _library_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, gather: bool, transposed: bool
) -> Tensor:
    inputs = gather_rows(x, rows) if gather else x
    matrix = weight if transposed else weight.t()
    return inputs @ matrix if bias is None else torch.addmm(bias, inputs, matrix)


def fused_gather_linear_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    residual: Tensor | None,
    gather: bool,
    transposed: bool,
) -> Tensor:
    """`gather_linear_scatter` with the product as one kernel, for any dtype."""
    if residual is not None:
        out = residual.clone(memory_format=torch.contiguous_format)
        fused_gather_linear_scatter_(out, x, weight, bias, rows, gather, transposed)
        return out
    out = torch.empty((rows.shape[0], weight.shape[1 if transposed else 0]), dtype=x.dtype, device=x.device)
    _fused_product(out, x, weight, bias, rows, gather, transposed, add=False)
    return out


def fused_gather_linear_scatter_(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, gather: bool, transposed: bool
) -> None:
    """`gather_linear_scatter_` as one kernel, for any dtype."""
    _fused_product(out, x, weight, bias, rows, gather, transposed, add=True)


def _fused_product(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    gather: bool,
    transposed: bool,
    add: bool,
) -> None:
    """The product added to out at rows, or stored as out `[S, N]`."""
    matrix = weight if transposed else weight.t()
    S, (K, N) = rows.shape[0], matrix.shape
    tile = _tile(x, S, N)
    common.launch(
        token_elimination_kernels.gather_matmul_kernel, (ceil_div(S, tile.rows) * ceil_div(N, tile.columns),), x.device,
        x, matrix, bias, rows.contiguous(), out, S, K, N,
        *x.stride(), *matrix.stride(), 0 if bias is None else bias.stride(0), *out.stride(),
        GATHER=gather, ADD=add, BIAS=bias is not None,
        BLOCK_S=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.inner, GROUP_S=8, **tile.options(),
    )  # fmt: skip


LAUNCHERS: dict[str, Callable[..., Any]] = {
    launcher.__name__: checked(launcher, token_checks.CHECKS)
    for launcher in (gather_rows, scatter_add_rows, scatter_add_rows_, gather_linear_scatter, gather_linear_scatter_)
}
"""Operator name to launcher; each takes exactly the operator's arguments, positionally, and checks them first."""
