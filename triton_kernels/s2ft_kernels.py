"""The kernels behind `s2ft.py`."""

from __future__ import annotations

import triton.language as tl

from .common import dot, jit, pointers


@jit
def gather_columns_kernel(
    x_ptr, indices_ptr, out_ptr, M, count, pitch, x_stride_m, x_stride_k,
    GATHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """`out[:, :count] = x[:, indices]`, zeros behind; out `[M, pitch]` contiguous. Without GATHER all columns of x.

    Bytes: e M pitch written, and e M count read where channels are neighbors, else the sector of 32 bytes of each.
    """
    first_row, entries = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    rows = tl.arange(0, BLOCK_M)
    channels = tl.load(indices_ptr + entries, mask=entries < count, other=0) if GATHER else entries
    row_inside = (rows < M - first_row)[:, None]
    x_ptrs = pointers(x_ptr + first_row * x_stride_m, rows, x_stride_m, channels, x_stride_k)
    x = tl.load(x_ptrs, mask=row_inside & (entries < count)[None, :], other=0.0)
    out_ptrs = pointers(out_ptr + first_row * pitch, rows, pitch, entries, 1)
    tl.store(out_ptrs, x, mask=row_inside & (entries < pitch)[None, :])


@jit
def slice_grad_kernel(
    left_ptr, right_ptr, indices_ptr, out_ptr, M, L, R, count,
    left_stride_m, left_stride_l, right_stride_m, right_stride_r, out_stride_l, out_stride_r, chunk,
    GATHER: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`out[split] = left^T right` over the split's `chunk` steps of M; with GATHER, of right's columns at indices.

    left `[M, L]`, right `[M, R]`, of whose products the first `count` are wanted: R may be padded to what is read 16
    bytes at a time. out `[splits, L, count]`, a split by its strides. Programs side by side share their columns of left
    in L2, so that these come from memory once.
    Bytes: e M (L + R) from memory, e M (L ceil(R / BLOCK_R) + R ceil(L / BLOCK_L)) through the caches, where an element
    that is gathered alone is a sector of 32, and 8 splits L R when split; FLOPs: 2 M L R.
    """
    left_columns = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    right_columns = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split, depth = tl.program_id(2).to(tl.int64), tl.arange(0, BLOCK_M)
    left_inside, right_inside = left_columns < L, right_columns < R
    channels = tl.load(indices_ptr + right_columns, mask=right_inside, other=0) if GATHER else right_columns
    begin = split * chunk * BLOCK_M
    end = tl.minimum(begin + chunk * BLOCK_M, M)
    left_ptrs = pointers(left_ptr + begin * left_stride_m, depth, left_stride_m, left_columns, left_stride_l)
    right_ptrs = pointers(right_ptr + begin * right_stride_m, depth, right_stride_m, channels, right_stride_r)
    total = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
    for m in range(begin, end, BLOCK_M):
        depth_inside = (depth < M - m)[:, None]
        left = tl.load(left_ptrs, mask=depth_inside & left_inside[None, :], other=0.0)
        right = tl.load(right_ptrs, mask=depth_inside & right_inside[None, :], other=0.0)
        total = dot(tl.trans(left), right, total)
        left_ptrs += BLOCK_M * left_stride_m
        right_ptrs += BLOCK_M * right_stride_m
    out_ptrs = pointers(out_ptr + split * L * count, left_columns, out_stride_l, right_columns, out_stride_r)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=left_inside[:, None] & (right_columns < count)[None, :])
