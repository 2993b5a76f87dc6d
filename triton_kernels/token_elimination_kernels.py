"""The kernels behind `token_elimination.py`.

`rows [S]` int32 as everywhere in this family: a negative entry stands for no row, whose loads give zeros and whose
stores are passed over. Costs at `e` bytes per element.
"""

from __future__ import annotations

import triton.language as tl

from .common import dot, jit, pointers


@jit
def gather_rows_kernel(
    x_ptr, rows_ptr, out_ptr, S, C, x_stride_m, x_stride_c, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """`out = x[rows]`, out `[S, C]` contiguous. Bytes: 2 e S C."""
    first_entry, columns = tl.program_id(0).to(tl.int64) * BLOCK_S, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    entries = tl.arange(0, BLOCK_S)
    entry_inside = entries < S - first_entry
    rows = tl.load(rows_ptr + first_entry + entries, mask=entry_inside, other=-1)
    inside = (columns < C)[None, :]
    x_ptrs = pointers(x_ptr, rows, x_stride_m, columns, x_stride_c)
    values = tl.load(x_ptrs, mask=(rows >= 0)[:, None] & inside, other=0.0)
    tl.store(pointers(out_ptr + first_entry * C, entries, C, columns, 1), values, mask=entry_inside[:, None] & inside)


@jit
def scatter_add_rows_kernel(
    out_ptr, values_ptr, rows_ptr, S, C, out_stride_m, out_stride_c, values_stride_s, values_stride_c,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`out[rows] += values` in place, rounded once. Bytes: 3 e S C."""
    first_entry, columns = tl.program_id(0).to(tl.int64) * BLOCK_S, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    entries = tl.arange(0, BLOCK_S)
    rows = tl.load(rows_ptr + first_entry + entries, mask=entries < S - first_entry, other=-1)
    inside = (rows >= 0)[:, None] & (columns < C)[None, :]
    out_ptrs = pointers(out_ptr, rows, out_stride_m, columns, out_stride_c)
    values_ptrs = pointers(
        values_ptr + first_entry * values_stride_s, entries, values_stride_s, columns, values_stride_c
    )
    total = tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(values_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def gather_matmul_kernel(
    x_ptr, matrix_ptr, bias_ptr, rows_ptr, out_ptr, S, K, N,
    x_stride_m, x_stride_k, matrix_stride_k, matrix_stride_n, bias_stride, out_stride_m, out_stride_n,
    GATHER: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_S: tl.constexpr,
):  # fmt: skip
    """`x[rows] matrix + bias`: with ADD added to out `[M, N]` at rows, else stored as out `[S, N]`; rounded once.

    Without GATHER x is `[S, K]`, its rows gathered already. A row's place is looked up once and stays in the pointers,
    so that the loop is that of a dense product.
    Bytes: e (S K + K N + S N), with ADD e S N more, and 4 S; FLOPs: 2 S K N.
    """
    # Programs walk GROUP_S row blocks down before they step right, so that a wave shares both operands in L2.
    program = tl.program_id(0)
    in_group = GROUP_S * tl.cdiv(N, BLOCK_N)
    first_block = program // in_group * GROUP_S
    group_rows = tl.minimum(tl.cdiv(S, BLOCK_S) - first_block, GROUP_S)
    first_entry = (first_block + program % in_group % group_rows).to(tl.int64) * BLOCK_S
    first_column = program % in_group // group_rows * BLOCK_N
    entries, columns, inner = tl.arange(0, BLOCK_S), first_column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    entry_inside, column_inside = entries < S - first_entry, (columns < N)[None, :]
    rows = tl.load(rows_ptr + first_entry + entries, mask=entry_inside, other=-1)
    is_row = (rows >= 0)[:, None]

    x_ptrs = pointers(x_ptr, rows if GATHER else first_entry + entries, x_stride_m, inner, x_stride_k)
    matrix_ptrs = pointers(matrix_ptr, inner, matrix_stride_k, columns, matrix_stride_n)
    total = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for first_inner in range(0, K, BLOCK_K):
        inner_inside = inner < K - first_inner
        x = tl.load(x_ptrs, mask=is_row & inner_inside[None, :], other=0.0)
        matrix = tl.load(matrix_ptrs, mask=inner_inside[:, None] & column_inside, other=0.0)
        total = dot(x, matrix, total)
        x_ptrs += BLOCK_K * x_stride_k
        matrix_ptrs += BLOCK_K * matrix_stride_k

    # In two halves: beside all of the sums there is no room for the residual in registers.
    half: tl.constexpr = BLOCK_N // 2
    left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK_S, 2, half)), (0, 2, 1)))
    for part in tl.static_range(2):
        columns = first_column + part * half + tl.arange(0, half)
        column_inside = columns < N
        result = left if part == 0 else right
        if BIAS:
            result += tl.load(bias_ptr + columns * bias_stride, mask=column_inside, other=0.0).to(tl.float32)[None, :]
        if ADD:
            inside = is_row & column_inside[None, :]
            out_ptrs = pointers(out_ptr, rows, out_stride_m, columns, out_stride_n)
            result += tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)
        else:
            inside = entry_inside[:, None] & column_inside[None, :]
            out_ptrs = pointers(out_ptr + first_entry * out_stride_m, entries, out_stride_m, columns, out_stride_n)
            result = tl.where(is_row, result, 0.0)
        tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=inside)
