"""The LoRA family's Triton kernels; `lora.py` launches them and chooses their tiles.

Letters as everywhere: activations `[M, C]`, rank r, `D` the dropout mask. A kernel walks its tiles with 64-bit
offsets and masks every edge, so sizes and strides are free; products are formed in the activations' dtype on tensor
cores and summed in float32. Dropout zeroes elements exactly; its factor `1 / (1 - p)` is folded into `scaling`.
The costs stated are what must move and be computed, at `e` bytes per activation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, dot_to_16_bits, dropout_keep, jit, pointers


@jit
def dropout_mask_kernel(out_ptr, rng_ptr, M, C, threshold, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The keep mask itself, one byte per element. Bytes: M C; a Philox call (about 70 integer operations) per 8."""
    first_row, first_column = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.program_id(1) * BLOCK_C
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    keep = dropout_keep(rng_ptr, threshold, first_row + rows, first_column, BLOCK_M, BLOCK_C, 1)
    inside = (rows < M - first_row)[:, None] & (columns < C - first_column)[None, :]
    out_ptrs = pointers(out_ptr + first_row * C + first_column, rows, C, columns, 1)
    tl.store(out_ptrs, keep.to(tl.int8), mask=inside)


@jit
def shrink_kernel(
    x_ptr, factor_ptr, out_ptr, rng_ptr, M, C, rank,
    x_stride_m, x_stride_c, factor_stride_r, factor_stride_c,
    scaling, threshold, chunk,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`out[split] = scaling (D * x) factor^T` over the split's `chunk` column tiles; out `[splits, M, r]` float32.

    Bytes: e M C (x once) + 8 splits M r when split; FLOPs: 2 M C r.
    """
    first_row, split = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.program_id(1)
    first_rank = tl.program_id(2) * BLOCK_R
    rows, columns, ranks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C), first_rank + tl.arange(0, BLOCK_R)
    row_inside, rank_inside = (rows < M - first_row)[:, None], (ranks < rank)[None, :]
    begin = split * chunk * BLOCK_C
    end = tl.minimum(begin + chunk * BLOCK_C, C)
    x_ptrs = pointers(x_ptr + first_row * x_stride_m, rows, x_stride_m, begin + columns, x_stride_c)
    factor_ptrs = pointers(factor_ptr, begin + columns, factor_stride_c, ranks, factor_stride_r)
    dtype = x_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first_column in range(begin, end, BLOCK_C):
        column_inside = columns < C - first_column
        x = tl.load(x_ptrs, mask=row_inside & column_inside[None, :], other=0.0)
        factor = tl.load(factor_ptrs, mask=column_inside[:, None] & rank_inside, other=0.0).to(dtype)
        if DROPOUT:
            keep = dropout_keep(rng_ptr, threshold, first_row + rows, first_column, BLOCK_M, BLOCK_C, 1)
            x = tl.where(keep, x, tl.zeros_like(x))
        total = dot(x, factor, total)
        x_ptrs += BLOCK_C * x_stride_c
        factor_ptrs += BLOCK_C * factor_stride_c
    out_ptrs = pointers(out_ptr + (split.to(tl.int64) * M + first_row) * rank, rows, rank, ranks, 1)
    tl.store(out_ptrs, total * scaling, mask=row_inside & rank_inside)


@triton.jit
def low_rank_tile(
    hidden_ptr, factor_ptr, rng_ptr, first_row, first_column, M, C, rank,
    hidden_stride_m, hidden_stride_r, factor_stride_r, factor_stride_c, scaling, threshold, dtype: tl.constexpr,
    EXACT: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One `[BLOCK_M, BLOCK_C]` float32 tile of `D * (scaling hidden factor)`, operands rounded to `dtype` or EXACT."""
    rows, columns, ranks = tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    row_inside, column_inside = (rows < M - first_row)[:, None], (columns < C)[None, :]
    if DROPOUT:  # ahead of the product: the mask waits as bits, the accumulator would fill the registers
        keep = dropout_keep(rng_ptr, threshold, first_row + rows, first_column, BLOCK_M, BLOCK_C, 4)
    hidden_ptrs = pointers(hidden_ptr + first_row * hidden_stride_m, rows, hidden_stride_m, ranks, hidden_stride_r)
    factor_ptrs = pointers(factor_ptr, ranks, factor_stride_r, columns, factor_stride_c)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    # Mostly one step; buffers for a pipelined loop would take the shared memory of the GEMM's own stages.
    for first_rank in tl.range(0, rank, BLOCK_R, num_stages=1):
        rank_inside = ranks < rank - first_rank
        hidden = tl.load(hidden_ptrs, mask=row_inside & rank_inside[None, :], other=0.0) * scaling
        factor = tl.load(factor_ptrs, mask=rank_inside[:, None] & column_inside, other=0.0)
        if EXACT and dtype != tl.float32:
            total = dot_to_16_bits(hidden, factor, total)
        else:
            total = dot(hidden.to(dtype), factor.to(dtype), total)
        hidden_ptrs += BLOCK_R * hidden_stride_r
        factor_ptrs += BLOCK_R * factor_stride_r
    if DROPOUT:
        total = tl.where(keep, total, 0.0)
    return total


@jit
def accumulate_kernel(
    out_ptr, hidden_ptr, factor_ptr, rng_ptr, M, C, rank,
    out_stride_m, out_stride_c, hidden_stride_m, hidden_stride_r, factor_stride_r, factor_stride_c,
    scaling, threshold,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`out += D * (scaling hidden factor)` in place, rounded once: the merging of weights relies on it.

    Bytes: 2 e M C; FLOPs: 2 M C r, on 16-bit tensor cores up to three times that, which the bytes hide.
    """
    first_row, first_column = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.program_id(1) * BLOCK_C
    rows, columns = tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_C)
    inside = (rows < M - first_row)[:, None] & (columns < C)[None, :]
    out_ptrs = pointers(out_ptr + first_row * out_stride_m, rows, out_stride_m, columns, out_stride_c)
    out = tl.load(out_ptrs, mask=inside, other=0.0)
    dtype = out_ptr.dtype.element_ty
    total = low_rank_tile(
        hidden_ptr, factor_ptr, rng_ptr, first_row, first_column, M, C, rank,
        hidden_stride_m, hidden_stride_r, factor_stride_r, factor_stride_c, scaling, threshold, dtype,
        True, DROPOUT, BLOCK_M, BLOCK_C, BLOCK_R,
    )  # fmt: skip
    tl.store(out_ptrs, (out.to(tl.float32) + total).to(dtype), mask=inside)


@jit
def matmul_kernel(
    x_ptr, matrix_ptr, bias_ptr, hidden_ptr, factor_ptr, out_ptr, rng_ptr, M, C_in, C_out, rank,
    x_stride_m, x_stride_c, matrix_stride_i, matrix_stride_o, bias_stride, hidden_stride_m, hidden_stride_r,
    factor_stride_r, factor_stride_c, scaling, threshold,
    DROPOUT: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """`out = x matrix + bias + D * (scaling hidden factor)`, out `[M, C_out]` contiguous, one accumulator throughout.

    The rank-r product opens the sum: r more columns of the inner dimension, and the only place where the mask can be
    applied to it without a second accumulator, which would not fit into registers beside a 128 x 256 one.
    Bytes: e (M C_in + C_in C_out + M C_out); FLOPs: 2 M C_out (C_in + r), r / C_in more than the frozen product.
    """
    # Programs walk GROUP_M row blocks down before they step right, so that a wave shares both operands in L2.
    program = tl.program_id(0)
    in_group = GROUP_M * tl.cdiv(C_out, BLOCK_C)
    first_block = program // in_group * GROUP_M
    group_rows = tl.minimum(tl.cdiv(M, BLOCK_M) - first_block, GROUP_M)
    first_row = (first_block + program % in_group % group_rows).to(tl.int64) * BLOCK_M
    first_column = program % in_group // group_rows * BLOCK_C
    rows, columns, inner = tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    row_inside, column_inside = (rows < M - first_row)[:, None], (columns < C_out)[None, :]
    dtype = x_ptr.dtype.element_ty

    total = low_rank_tile(
        hidden_ptr, factor_ptr, rng_ptr, first_row, first_column, M, C_out, rank,
        hidden_stride_m, hidden_stride_r, factor_stride_r, factor_stride_c, scaling, threshold, dtype,
        False, DROPOUT, BLOCK_M, BLOCK_C, BLOCK_R,
    )  # fmt: skip

    x_ptrs = pointers(x_ptr + first_row * x_stride_m, rows, x_stride_m, inner, x_stride_c)
    matrix_ptrs = pointers(matrix_ptr, inner, matrix_stride_i, columns, matrix_stride_o)
    for first_inner in range(0, C_in, BLOCK_K):
        inner_inside = inner < C_in - first_inner
        x = tl.load(x_ptrs, mask=row_inside & inner_inside[None, :], other=0.0)
        matrix = tl.load(matrix_ptrs, mask=inner_inside[:, None] & column_inside, other=0.0)
        total = dot(x, matrix, total)
        x_ptrs += BLOCK_K * x_stride_c
        matrix_ptrs += BLOCK_K * matrix_stride_i

    if BIAS:
        total += tl.load(bias_ptr + columns * bias_stride, mask=columns < C_out, other=0.0).to(tl.float32)[None, :]
    out_ptrs = pointers(out_ptr + first_row * C_out, rows, C_out, columns, 1)
    tl.store(out_ptrs, total.to(dtype), mask=row_inside & column_inside)


@jit
def factor_grad_kernel(
    x_ptr, hidden_ptr, out_ptr, rng_ptr, M, C, rank,
    x_stride_m, x_stride_c, hidden_stride_m, hidden_stride_r, out_stride_c, out_stride_r,
    scaling, threshold, chunk,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`out[split] = scaling (D * x)^T hidden` over the split's `chunk` row tiles; out `[splits, C, r]` by its strides.

    C is the product's long side, so that x^T is the operand that needs 64 rows for Hopper's matrix instruction.
    Bytes: e M C (x once) + 4 M r per column block + 8 splits C r when split; FLOPs: 2 M C r.
    """
    first_column, split = tl.program_id(0) * BLOCK_C, tl.program_id(1)
    columns = first_column + tl.arange(0, BLOCK_C)
    rows, ranks = tl.arange(0, BLOCK_M), tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    column_inside, rank_inside = (columns < C)[None, :], (ranks < rank)[None, :]
    begin = split.to(tl.int64) * chunk * BLOCK_M
    end = tl.minimum(begin + chunk * BLOCK_M, M)
    x_ptrs = pointers(x_ptr + begin * x_stride_m, rows, x_stride_m, columns, x_stride_c)
    hidden_ptrs = pointers(hidden_ptr + begin * hidden_stride_m, rows, hidden_stride_m, ranks, hidden_stride_r)
    dtype = x_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for first_row in range(begin, end, BLOCK_M):
        row_inside = (rows < M - first_row)[:, None]
        x = tl.load(x_ptrs, mask=row_inside & column_inside, other=0.0)
        hidden = tl.load(hidden_ptrs, mask=row_inside & rank_inside, other=0.0).to(dtype)
        if DROPOUT:
            keep = dropout_keep(rng_ptr, threshold, first_row + rows, first_column, BLOCK_M, BLOCK_C, 1)
            x = tl.where(keep, x, tl.zeros_like(x))
        total = dot(tl.trans(x), hidden, total)
        x_ptrs += BLOCK_M * x_stride_m
        hidden_ptrs += BLOCK_M * hidden_stride_m
    out_ptrs = pointers(out_ptr + split.to(tl.int64) * C * rank, columns, out_stride_c, ranks, out_stride_r)
    tl.store(out_ptrs, (total * scaling).to(out_ptr.dtype.element_ty), mask=(columns < C)[:, None] & rank_inside)


@jit
def grad_b_kernel(
    dy_ptr, hidden_ptr, factor_ptr, grad_hidden_ptr, grad_b_ptr, M, N, rank,
    dy_stride_m, dy_stride_n, hidden_stride_m, hidden_stride_r, factor_stride_n, factor_stride_r,
    scaling, chunk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Both gradients that need dy, from one read of it: BLOCK_N columns by a split of `chunk` row tiles per program.

    `grad_hidden[panel] = scaling dy lora_b` over the panel's columns, written row tile by row tile, `[panels, M, r]`;
    `grad_b[split] = scaling dy^T hidden` over the split's rows, kept in registers, `[splits, N, r]`. Both are float32,
    or final where there is nothing left to sum. BLOCK_R covers the rank.
    Bytes: e M N (dy once) + 8 panels M r + 8 splits N r; FLOPs: 4 M N r.
    """
    panel, split = tl.program_id(0), tl.program_id(1)
    rows, columns, ranks = tl.arange(0, BLOCK_M), panel * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    rank_inside = (ranks < rank)[None, :]
    grad_b_inside = (columns < N)[:, None] & rank_inside
    begin = split.to(tl.int64) * chunk * BLOCK_M
    end = tl.minimum(begin + chunk * BLOCK_M, M)
    dy_ptrs = pointers(dy_ptr + begin * dy_stride_m, rows, dy_stride_m, columns, dy_stride_n)
    hidden_ptrs = pointers(hidden_ptr + begin * hidden_stride_m, rows, hidden_stride_m, ranks, hidden_stride_r)
    grad_hidden_ptrs = pointers(grad_hidden_ptr + (panel.to(tl.int64) * M + begin) * rank, rows, rank, ranks, 1)
    dtype = dy_ptr.dtype.element_ty
    factor_ptrs = pointers(factor_ptr, columns, factor_stride_n, ranks, factor_stride_r)
    factor = tl.load(factor_ptrs, mask=grad_b_inside, other=0.0).to(dtype)
    grad_b = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for first_row in range(begin, end, BLOCK_M):
        row_inside = (rows < M - first_row)[:, None]
        dy = tl.load(dy_ptrs, mask=row_inside & (columns < N)[None, :], other=0.0)
        hidden = tl.load(hidden_ptrs, mask=row_inside & rank_inside, other=0.0).to(dtype)
        grad_hidden = dot(dy, factor, tl.zeros((BLOCK_M, BLOCK_R), tl.float32))
        grad_b = dot(tl.trans(dy), hidden, grad_b)
        tl.store(grad_hidden_ptrs, grad_hidden * scaling, mask=row_inside & rank_inside)
        dy_ptrs += BLOCK_M * dy_stride_m
        hidden_ptrs += BLOCK_M * hidden_stride_m
        grad_hidden_ptrs += BLOCK_M * rank
    grad_b_ptrs = pointers(grad_b_ptr + split.to(tl.int64) * N * rank, columns, rank, ranks, 1)
    tl.store(grad_b_ptrs, (grad_b * scaling).to(grad_b_ptr.dtype.element_ty), mask=grad_b_inside)
