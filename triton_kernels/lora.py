"""The LoRA family on Triton: one launcher per operator of `csrc/library.cpp`, and the table of their tiles.

Formulas and contracts are those of `peft_kernels/reference/lora.py`; float64 is not served. Inputs may have any
strides, factors any of float32, bfloat16 and float16: they are cast to the activations' dtype on load, as is the
float32 `hidden`, which is the rounding PyTorch's own product in that dtype has (`lora_accumulate_` keeps more, for the
merging of weights). Everything is summed in float32.

Tiles follow from dtype, shape and the card's shared memory, never from measurements at run time, so that the same
call gives the same bits on every run; sums that are cut over programs are finished by a second kernel in a fixed
order, never by atomics. A new sequence length compiles nothing new unless it crosses one of the bounds below.

The functions trust their arguments and call each other; what users' calls reach is `LAUNCHERS`, which checks first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import common, lora_kernels
from .checks import checked
from .common import Dropout, Tile, ceil_div, padded

# Bytes per activation -> rank up to which `lora_grad_b` reads dy once. The partial sums of its one-pass kernel grow
# with the rank (8 r bytes per row and column panel); at 64 they cost as much as the second read they save.
_ONE_PASS_RANK = {2: 32, 4: 16}
# Dtypes whose big product is ours; float32 goes to the library's GEMM and our accumulate kernel, since exact float32
# has no tensor core and Triton's loop over scalar multiply-adds is well behind cuBLAS (which also honors TF32).
_FUSED_MATMUL_DTYPES = (torch.bfloat16, torch.float16)
_KIB = 1024


# (kernel, bytes per activation) -> tile. 16-bit tiles keep two to three stages of 8 to 32 KiB in flight on two to four
# programs per multiprocessor, which covers the latency of HBM. Float32 products run on scalar units, where long inner
# steps spill. "wide" is for ranks above 32: more rows share each read of the factor.
_TILES = {
    ("shrink", 2): Tile(64, 64, num_warps=4, num_stages=4),
    ("shrink", 4): Tile(64, 32, num_warps=4, num_stages=3),
    ("shrink wide", 2): Tile(128, 64, num_warps=8, num_stages=3),
    ("shrink wide", 4): Tile(128, 16, num_warps=8, num_stages=3),
    ("factor_grad", 2): Tile(64, 128, num_warps=8, num_stages=3),
    ("factor_grad", 4): Tile(32, 64, num_warps=8, num_stages=3),
    ("grad_b", 2): Tile(64, 256, num_warps=8, num_stages=2),
    ("grad_b", 4): Tile(32, 128, num_warps=8, num_stages=2),
    ("accumulate", 2): Tile(64, 128, num_warps=8, num_stages=1),
    ("accumulate", 4): Tile(64, 64, num_warps=4, num_stages=1),
    ("mask", 1): Tile(32, 256, num_warps=4, num_stages=1),
}
# The GEMM's tiles: two warpgroups on 128 x 256 where a block has 144 KiB and the grid still fills an H100 (on Ampere,
# whose accumulators share the registers with the operands, that tile spills); 128 x 128 elsewhere; few rows.
_MATMUL_LARGE = Tile(128, 256, num_warps=8, num_stages=3, inner=64)
_MATMUL_MEDIUM = Tile(128, 128, num_warps=8, num_stages=3, inner=64)
_MATMUL_FLAT = Tile(64, 64, num_warps=4, num_stages=4, inner=64)


def _matmul_tile(device: torch.device, M: int, columns: int) -> Tile:
    if M <= 64:
        return _MATMUL_FLAT
    fills = ceil_div(M, _MATMUL_LARGE.rows) * ceil_div(columns, _MATMUL_LARGE.columns) >= 132
    hopper_or_later = common.shared_memory(device) >= 200 * _KIB
    return _MATMUL_LARGE if fills and hopper_or_later else _MATMUL_MEDIUM


def _rank_block(rank: int, x: Tensor) -> int:
    """Width of a rank tile where all of the rank is wanted at once; half on cards with 100 KiB, and in float32."""
    wide = x.element_size() == 2 and common.shared_memory(x.device) >= 160 * _KIB
    return padded(rank, 16, 128 if wide else 64)


def _tile(kernel: str, tensor: Tensor) -> Tile:
    return _TILES[kernel, tensor.element_size()]


def dropout_mask(rows: int, columns: int, dropout_p: float, rng_state: Tensor) -> Tensor:
    """See `peft_kernels.reference.philox.dropout_mask`."""
    out = torch.empty((rows, columns), dtype=torch.bool, device=rng_state.device)
    tile = _tile("mask", out)
    grid = (ceil_div(rows, tile.rows), ceil_div(columns, tile.columns))
    threshold = common.dropout_threshold(dropout_p)
    common.launch(
        lora_kernels.dropout_mask_kernel, grid, out.device,
        out.view(torch.int8), rng_state.contiguous(), rows, columns, threshold,
        BLOCK_M=tile.rows, BLOCK_C=tile.columns, **tile.options(),
    )  # fmt: skip
    return out


def lora_shrink(x: Tensor, factor: Tensor, scaling: float, dropout_p: float, rng_state: Tensor | None) -> Tensor:
    """See `peft_kernels.reference.lora.lora_shrink`."""
    (M, C), rank = x.shape, factor.shape[0]
    dropout, tile = Dropout(dropout_p, rng_state), _tile("shrink" if rank <= 32 else "shrink wide", x)
    block_r = _rank_block(rank, x)
    row_blocks, rank_blocks = ceil_div(M, tile.rows), ceil_div(rank, block_r)
    chunk, splits = tile.splits(row_blocks * rank_blocks, ceil_div(C, tile.columns))
    out = torch.empty((M, rank), dtype=torch.float32, device=x.device)
    partial = out if splits == 1 else torch.empty((splits, M, rank), dtype=torch.float32, device=x.device)
    common.launch(
        lora_kernels.shrink_kernel, (row_blocks, splits, rank_blocks), x.device,
        x, factor, partial, dropout.rng_state, M, C, rank, *x.stride(), *factor.stride(),
        scaling * dropout.scale, dropout.threshold, chunk,
        DROPOUT=dropout.active, BLOCK_M=tile.rows, BLOCK_C=tile.columns, BLOCK_R=block_r, **tile.options(),
    )  # fmt: skip
    if splits > 1:
        common.sum_partials(partial, out)
    return out


def lora_accumulate_(
    out: Tensor, hidden: Tensor, factor: Tensor, scaling: float, dropout_p: float, rng_state: Tensor | None
) -> None:
    """See `peft_kernels.reference.lora.lora_accumulate_`."""
    (M, C), rank = out.shape, hidden.shape[1]
    dropout, tile = Dropout(dropout_p, rng_state), _tile("accumulate", out)
    common.launch(
        lora_kernels.accumulate_kernel, (ceil_div(M, tile.rows), ceil_div(C, tile.columns)), out.device,
        out, hidden, factor, dropout.rng_state, M, C, rank, *out.stride(), *hidden.stride(), *factor.stride(),
        scaling * dropout.scale, dropout.threshold,
        DROPOUT=dropout.active, BLOCK_M=tile.rows, BLOCK_C=tile.columns, BLOCK_R=16, **tile.options(),
    )  # fmt: skip


def lora_matmul(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    factor: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> Tensor:
    """See `peft_kernels.reference.lora.lora_matmul`; one fused kernel, or library GEMM and `lora_accumulate_`."""
    if x.dtype in _FUSED_MATMUL_DTYPES:
        return fused_matmul(x, matrix, bias, hidden, factor, scaling, dropout_p, rng_state)
    out = x @ matrix if bias is None else torch.addmm(bias, x, matrix)
    lora_accumulate_(out, hidden, factor, scaling, dropout_p, rng_state)
    return out


def fused_matmul(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    factor: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> Tensor:
    """`lora_matmul` as one kernel, for any dtype."""
    (M, C_in), C_out, rank = x.shape, matrix.shape[1], hidden.shape[1]
    dropout, tile = Dropout(dropout_p, rng_state), _matmul_tile(x.device, M, C_out)
    out = torch.empty((M, C_out), dtype=x.dtype, device=x.device)
    common.launch(
        lora_kernels.matmul_kernel, (ceil_div(M, tile.rows) * ceil_div(C_out, tile.columns),), x.device,
        x, matrix, bias, hidden, factor, out, dropout.rng_state, M, C_in, C_out, rank,
        *x.stride(), *matrix.stride(), 0 if bias is None else bias.stride(0), *hidden.stride(), *factor.stride(),
        scaling * dropout.scale, dropout.threshold,
        DROPOUT=dropout.active, BIAS=bias is not None, BLOCK_M=tile.rows, BLOCK_C=tile.columns, BLOCK_K=tile.inner,
        BLOCK_R=padded(rank, 16, 32), GROUP_M=8, **tile.options(),
    )  # fmt: skip
    return out


def lora_factor_grad(
    x: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
    dtype: torch.dtype,
    transposed: bool,
) -> Tensor:
    """See `peft_kernels.reference.lora.lora_factor_grad`."""
    (M, C), rank = x.shape, hidden.shape[1]
    dropout, tile = Dropout(dropout_p, rng_state), _tile("factor_grad", x)
    block_r = _rank_block(rank, x)
    column_blocks, rank_blocks = ceil_div(C, tile.columns), ceil_div(rank, block_r)
    chunk, splits = tile.splits(column_blocks * rank_blocks, ceil_div(M, tile.rows))
    shape, strides = ((C, rank), (rank, 1)) if transposed else ((rank, C), (1, C))
    out = torch.empty(shape, dtype=dtype, device=x.device)
    partial = out if splits == 1 else torch.empty((splits, *shape), dtype=torch.float32, device=x.device)
    common.launch(
        lora_kernels.factor_grad_kernel, (column_blocks, splits, rank_blocks), x.device,
        x, hidden, partial, dropout.rng_state, M, C, rank, *x.stride(), *hidden.stride(), *strides,
        scaling * dropout.scale, dropout.threshold, chunk,
        DROPOUT=dropout.active, BLOCK_M=tile.rows, BLOCK_C=tile.columns, BLOCK_R=block_r, **tile.options(),
    )  # fmt: skip
    if splits > 1:
        common.sum_partials(partial, out)
    return out


def lora_grad_b(grad_out: Tensor, hidden: Tensor, lora_b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """See `peft_kernels.reference.lora.lora_grad_b`."""
    (M, N), rank = grad_out.shape, hidden.shape[1]
    one_pass_rank = _ONE_PASS_RANK[grad_out.element_size()]
    if rank > one_pass_rank:
        return (
            lora_shrink(grad_out, lora_b.t(), scaling, 0.0, None),
            lora_factor_grad(grad_out, hidden, scaling, 0.0, None, lora_b.dtype, True),
        )
    tile = _tile("grad_b", grad_out)
    panels = max(1, ceil_div(N, tile.columns))
    chunk, splits = tile.splits(panels, ceil_div(M, tile.rows))
    options = {"dtype": torch.float32, "device": grad_out.device}
    grad_hidden = torch.empty((M, rank), **options)
    grad_b = torch.empty((N, rank), dtype=lora_b.dtype, device=grad_out.device)
    partial_hidden = grad_hidden if panels == 1 else torch.empty((panels, M, rank), **options)
    partial_b = grad_b if splits == 1 else torch.empty((splits, N, rank), **options)
    common.launch(
        lora_kernels.grad_b_kernel, (panels, splits), grad_out.device,
        grad_out, hidden, lora_b, partial_hidden, partial_b, M, N, rank,
        *grad_out.stride(), *hidden.stride(), *lora_b.stride(), scaling, chunk,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_R=padded(rank, 16, one_pass_rank), **tile.options(),
    )  # fmt: skip
    if panels > 1:
        common.sum_partials(partial_hidden, grad_hidden)
    if splits > 1:
        common.sum_partials(partial_b, grad_b)
    return grad_hidden, grad_b


def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `peft_kernels.reference.lora.lora_linear_forward`."""
    hidden = lora_shrink(x, lora_a, 1.0, dropout_p, rng_state)
    return lora_matmul(x, weight.t(), bias, hidden, lora_b.t(), scaling, 0.0, None), hidden


def lora_linear_backward(
    grad_out: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `peft_kernels.reference.lora.lora_linear_backward`."""
    dx, grad_a, grad_b = grad_out.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    if not (need_x or need_a):
        if need_b:
            grad_b = lora_factor_grad(grad_out, hidden, scaling, 0.0, None, lora_b.dtype, True)
        return dx, grad_a, grad_b
    if need_b:
        grad_hidden, grad_b = lora_grad_b(grad_out, hidden, lora_b, scaling)
    else:
        grad_hidden = lora_shrink(grad_out, lora_b.t(), scaling, 0.0, None)
    if need_x:
        dx = lora_matmul(grad_out, weight, None, grad_hidden, lora_a, 1.0, dropout_p, rng_state)
    if x is not None and need_a:
        grad_a = lora_factor_grad(x, grad_hidden, 1.0, dropout_p, rng_state, lora_a.dtype, False)
    return dx, grad_a, grad_b


LAUNCHERS: dict[str, Callable[..., Any]] = {
    launcher.__name__: checked(launcher)
    for launcher in (
        dropout_mask, lora_shrink, lora_accumulate_, lora_matmul, lora_factor_grad, lora_grad_b, lora_linear_forward,
        lora_linear_backward,
    )
}  # fmt: skip
"""Operator name to launcher; each takes exactly the operator's arguments, positionally, and checks them first."""
