"""The kernels behind `sparse_delta.py`."""

from __future__ import annotations

import triton.language as tl

from .common import dot, jit, pointers


@jit
def sampled_product_kernel(
    dy_ptr, x_ptr, indices_ptr, starts_ptr, out_ptr, M, N, K, count, tiles,
    dy_stride_m, dy_stride_n, x_stride_m, x_stride_k, chunk,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """`out[split, e] = (dy^T x)[indices[e]]` over the split's `chunk` steps of M, for the entries e of one tile.

    The tile is a GEMM's, and stays in registers: of its rows, whose entries lie side by side in `indices`, BLOCK_E
    entries at a time are taken out by their columns. A tile without entries costs the reading of its bounds.
    dy `[M, N]`, x `[M, K]`, starts int64 `[N, tiles + 1]`, out `[splits, count]`.
    Bytes: e M (N K / BLOCK_K + K N / BLOCK_N) through the caches, 8 per bound, (4 or 8) + out's per entry; FLOPs of the
    tiles that have entries: 2 M BLOCK_N BLOCK_K each.
    """
    tile, split = tl.program_id(0), tl.program_id(2)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < N
    bounds = starts_ptr + rows.to(tl.int64) * (tiles + 1) + tile
    first = tl.load(bounds, mask=row_inside, other=0)
    last = tl.load(bounds + 1, mask=row_inside, other=0)
    most = tl.max(last - first, 0)
    if most == 0:
        return
    columns, depth = tile * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    begin = split.to(tl.int64) * chunk * BLOCK_M
    end = tl.minimum(begin + chunk * BLOCK_M, M)
    dy_ptrs = pointers(dy_ptr + begin * dy_stride_m, depth, dy_stride_m, rows, dy_stride_n)
    x_ptrs = pointers(x_ptr + begin * x_stride_m, depth, x_stride_m, columns, x_stride_k)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m in range(begin, end, BLOCK_M):
        depth_inside = (depth < M - m)[:, None]
        dy = tl.load(dy_ptrs, mask=depth_inside & row_inside[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=depth_inside & (columns < K)[None, :], other=0.0)
        total = dot(tl.trans(dy), x, total)
        dy_ptrs += BLOCK_M * dy_stride_m
        x_ptrs += BLOCK_M * x_stride_m
    before = rows.to(tl.int64) * K + tile * BLOCK_K
    out_ptr += split.to(tl.int64) * count
    for e in range(0, most, BLOCK_E):
        entries = first[:, None] + e + tl.arange(0, BLOCK_E)[None, :]
        taken = entries < last[:, None]
        positions = tl.load(indices_ptr + entries, mask=taken, other=0).to(tl.int64)
        column = tl.where(taken, positions - before[:, None], 0).to(tl.int32)
        values = tl.gather(total, column, 1)
        tl.store(out_ptr + entries, values.to(out_ptr.dtype.element_ty), mask=taken)
