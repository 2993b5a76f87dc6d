"""The kernels behind `token_selection.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, jit, pointers


@triton.jit
def head_sums(
    q_ptr, k_ptr, queries, keys, query_inside, key_inside, key_heads, D,
    q_stride_h, q_stride_t, q_stride_d, k_stride_h, k_stride_t, k_stride_d,
    GROUP: tl.constexpr, WHOLE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`sum over heads of max(0, q k^T)`, a tile `[BLOCK_Q queries, BLOCK_K keys]` in float32; a NaN stays one.

    WHOLE: BLOCK_D covers D, and a tile of keys is read once for the GROUP heads that share it.
    """
    # Heads move the base alone: a tile of pointers that loops carry would keep a layout that does not suit its load.
    depth = tl.arange(0, BLOCK_D)
    query_inside, key_inside = query_inside[:, None], key_inside[None, :]
    total = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for _ in range(key_heads):
        if WHOLE:
            inside = depth < D
            k_ptrs = pointers(k_ptr, depth, k_stride_d, keys, k_stride_t)
            k = tl.load(k_ptrs, mask=inside[:, None] & key_inside, other=0.0)
            for _ in range(GROUP):
                q_ptrs = pointers(q_ptr, queries, q_stride_t, depth, q_stride_d)
                q = tl.load(q_ptrs, mask=query_inside & inside[None, :], other=0.0)
                scores = dot(q, k, tl.zeros((BLOCK_Q, BLOCK_K), tl.float32))
                total += tl.where(scores < 0.0, 0.0, scores)
                q_ptr += q_stride_h
        else:
            for _ in range(GROUP):
                scores = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
                for first in range(0, D, BLOCK_D):
                    inside = depth < D - first
                    q_ptrs = pointers(q_ptr + first * q_stride_d, queries, q_stride_t, depth, q_stride_d)
                    k_ptrs = pointers(k_ptr + first * k_stride_d, depth, k_stride_d, keys, k_stride_t)
                    q = tl.load(q_ptrs, mask=query_inside & inside[None, :], other=0.0)
                    k = tl.load(k_ptrs, mask=inside[:, None] & key_inside, other=0.0)
                    scores = dot(q, k, scores)
                total += tl.where(scores < 0.0, 0.0, scores)
                q_ptr += q_stride_h
        k_ptr += k_stride_h
    return total


@jit
def block_scores_kernel(
    q_ptr, k_ptr, starts_ptr, out_ptr, batch, T, blocks, block_size, key_heads, D,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d, k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    GROUP: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_Q: tl.constexpr,
):  # fmt: skip
    """`out[i, b, j]`: what the queries of tile i add to the score of block j; out `[query tiles, B, blocks]` float32.

    A block of tokens is PARTS runs of SLOTS places, of which the first `block_size` are tokens. A tile has the same
    run of neighboring blocks, BLOCK_Q / SLOTS or BLOCK_K / SLOTS of them; the maximum of two blocks is taken over all
    pairs of runs.
    Bytes: per pair of tiles e D (heads BLOCK_Q + key_heads BLOCK_K), mostly from L2, and 4 per block; FLOPs: B heads
    T^2 D, half of all pairs, times (PARTS SLOTS / block_size)^2.
    """
    QUERY_BLOCKS: tl.constexpr = BLOCK_Q // SLOTS
    KEY_BLOCKS: tl.constexpr = BLOCK_K // SLOTS
    # Programs walk GROUP_Q tiles of queries down before they step right, so that a wave shares both in L2.
    program, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query_tiles = tl.cdiv(tl.cdiv(T, block_size), QUERY_BLOCKS)
    in_group = GROUP_Q * tl.cdiv(blocks, KEY_BLOCKS)
    first_tile = program // in_group * GROUP_Q
    group_tiles = tl.minimum(query_tiles - first_tile, GROUP_Q)
    query_tile = first_tile + program % in_group % group_tiles
    key_tile = program % in_group // group_tiles
    q_ptr += sequence * q_stride_b
    k_ptr += sequence * k_stride_b
    query_range, key_range = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    query_blocks = query_tile * QUERY_BLOCKS + query_range // SLOTS
    key_blocks = key_tile * KEY_BLOCKS + key_range // SLOTS
    largest = tl.zeros((QUERY_BLOCKS, KEY_BLOCKS), tl.int32)
    for pair in range(PARTS * PARTS):
        query_slot, key_slot = pair // PARTS * SLOTS + query_range % SLOTS, pair % PARTS * SLOTS + key_range % SLOTS
        queries, keys = query_blocks * block_size + query_slot, key_blocks * block_size + key_slot
        query_inside = (query_slot < block_size) & (queries < T)
        key_inside = (key_slot < block_size) & (key_blocks < blocks)
        seeing = query_inside
        if starts_ptr is not None:
            starts = tl.load(starts_ptr + sequence * T + queries, mask=query_inside, other=0)
            seeing &= starts <= tl.max(tl.where(key_inside, keys, -1), 0)
        # Keys behind all queries, or of other documents, are passed over.
        if tl.max(tl.where(seeing, queries, -1), 0) >= tl.min(keys, 0):
            total = head_sums(
                q_ptr, k_ptr, queries, keys, query_inside, key_inside, key_heads, D,
                q_stride_h, q_stride_t, q_stride_d, k_stride_h, k_stride_t, k_stride_d,
                GROUP, WHOLE, BLOCK_Q, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            seen = (keys[None, :] <= queries[:, None]) & query_inside[:, None] & key_inside[None, :]
            if starts_ptr is not None:
                seen &= keys[None, :] >= starts[:, None]
            # As no sum is negative, their bits are ordered as they are, and a NaN's lie above all.
            bits = tl.where(seen, total.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
            by_key = tl.max(tl.reshape(bits, (BLOCK_Q, KEY_BLOCKS, SLOTS)), 2)
            largest = tl.maximum(largest, tl.max(tl.reshape(by_key, (QUERY_BLOCKS, SLOTS, KEY_BLOCKS)), 1))
    own_blocks = key_tile * KEY_BLOCKS + tl.arange(0, KEY_BLOCKS)
    out_ptrs = out_ptr + (query_tile.to(tl.int64) * batch + sequence) * blocks + own_blocks
    tl.store(out_ptrs, tl.sum(largest.to(tl.float32, bitcast=True), 0), mask=own_blocks < blocks)
