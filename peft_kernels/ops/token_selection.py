"""Which tokens are kept: blocks of tokens scored by queries and keys, and the positions of those with large scores.

Formulas, shapes and names are those of `peft_kernels/reference/token_selection.py`. This file holds the checks, the
fake kernels and the registration. Nothing here waits for the device: the host knows every shape beforehand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends
from ..reference import token_selection as reference
from ..reference.lora import accumulation_dtype
from ._checks import FLOATING, describe, transforms_active
from ._register import register_operator, triton_launchers

_ROWS = 2**31  # flat rows are int32


def _fake_block_scores(q: Tensor, k: Tensor, block_size: int, starts: Tensor | None) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2] // block_size, dtype=accumulation_dtype(q.dtype))


def _fake_select_tokens(
    scores: Tensor, tokens: int, blocks: int, block_size: int, threshold: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, size = scores.shape[0], blocks * block_size + tokens % block_size
    return scores.new_empty(batch, size, dtype=torch.int32), scores.new_empty(batch, dtype=torch.int32)


def _register() -> None:
    triton = triton_launchers("token_selection")
    for name, definition, fake in (
        ("block_scores", reference.block_scores, _fake_block_scores),
        ("select_tokens", reference.select_tokens, _fake_select_tokens),
    ):
        register_operator(name, reference=definition, fake=fake, cuda=True, triton=triton)


_register()


def _check_integer(op: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")


def _check_tokens(op: str, tokens: int) -> None:
    _check_integer(op, "tokens", tokens)
    if tokens < 0:
        raise ValueError(f"{op}: tokens must not be negative, got {tokens}")


def _check_block_size(op: str, block_size: int) -> None:
    _check_integer(op, "block_size", block_size)
    if block_size < 1:
        raise ValueError(f"{op}: block_size must be at least 1, got {block_size}")


def _check_ratio(op: str, keep: float) -> None:
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"{op}: keep must be a number, got {keep!r}")
    if not 0.0 <= keep <= 1.0:  # written so that NaN fails
        raise ValueError(f"{op}: keep must be a ratio in [0, 1], got {keep}")


def _kept_blocks(blocks: int, keep: float) -> int:
    if keep == 1.0:
        return blocks
    return math.ceil(keep * blocks - 1e-9 * blocks)  # 0.7 of 10 are 7, though the product lies above it


def kept_tokens(tokens: int, keep: float, block_size: int = 64) -> int:
    """How many tokens of a sequence `select_tokens` has room for: it follows from the shape alone.

    Args:
        tokens: T, tokens of the sequence.
        keep: ratio of its whole blocks that are kept, in [0, 1], rounded up to a whole number of them.
        block_size: tokens per block.

    Returns:
        S: tokens of the kept blocks and those of an unfinished last block, which is always kept; none for `keep=0`.

    Raises:
        ValueError, TypeError: an argument is off.
    """
    _check_tokens("kept_tokens", tokens)
    _check_ratio("kept_tokens", keep)
    _check_block_size("kept_tokens", block_size)
    if keep == 0.0:
        return 0
    return _kept_blocks(tokens // block_size, keep) * block_size + tokens % block_size


def select_tokens(
    scores: Tensor,
    keep: float,
    block_size: int = 64,
    threshold: float | Tensor | None = None,
    *,
    tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens of the blocks with the largest scores, in order, for each sequence.

    Of `T // block_size` whole blocks the `ceil(keep * (T // block_size))` with the largest scores are kept, and the
    `T % block_size` tokens of an unfinished last block in any case, so that the count follows from the shape. `keep=0`
    keeps nothing, `keep=1` everything. Of equal scores the earlier block is taken, and a NaN is larger than any number,
    so that it is not hidden.

    Args:
        scores: `[B, T]`, a score per token, of which a block has the largest; or with `tokens`
            `[B, tokens // block_size]`, a score per block. float32, float64, or bfloat16 or float16, which are compared
            in float32. Any strides.
        keep: ratio of blocks, in [0, 1].
        block_size: tokens per block.
        threshold: of the blocks that `keep` allows only those with a score at least this large are kept; a number, or a
            0-d tensor on scores' device, which the host does not read.
        tokens: T, where scores are of blocks.

    Returns:
        positions int32 `[B, S]` in the sequence with S = `kept_tokens(T, keep, block_size)`, sorted, then -1 up to the
        end (only with a threshold); counts int32 `[B]`, how many are not -1. `flat_rows` makes rows of them.

    No gradient, and nothing is saved.

    Raises:
        ValueError, TypeError: an argument's value, shape, dtype or device is off; nothing has run.
    """
    op = "select_tokens"
    _check_ratio(op, keep)
    _check_block_size(op, block_size)
    if scores.dim() != 2:
        raise ValueError(f"{op}: scores must be 2-D, got {describe(scores)}")
    if scores.dtype not in FLOATING:
        raise TypeError(f"{op}: scores must be float32, bfloat16, float16 or float64, got {describe(scores)}")
    if tokens is not None:
        _check_tokens(op, tokens)
    if tokens is not None and scores.shape[1] != tokens // block_size:
        raise ValueError(
            f"{op}: scores must be [B, {tokens} // {block_size}] for {tokens} tokens, got {describe(scores)}"
        )
    scores = scores.detach().to(accumulation_dtype(scores.dtype))
    limit = None if threshold is None else _limit(op, threshold, scores)
    if tokens is None:
        tokens = scores.shape[1]
        blocks = tokens // block_size
        scores = scores[:, : blocks * block_size].unflatten(1, (blocks, block_size)).amax(2)
    if keep == 0.0:
        return (
            torch.empty(scores.shape[0], 0, dtype=torch.int32, device=scores.device),
            torch.zeros(scores.shape[0], dtype=torch.int32, device=scores.device),
        )
    backend = backends.forced_backend()
    kernel = backends.kernel(op, scores.device.type, scores.dtype, backend)
    return kernel(scores, tokens, _kept_blocks(scores.shape[1], keep), block_size, limit)  # type: ignore[no-any-return]


def _limit(op: str, threshold: float | Tensor, scores: Tensor) -> Tensor:
    if isinstance(threshold, Tensor):
        if threshold.dim() != 0 or threshold.dtype not in FLOATING:
            raise ValueError(f"{op}: threshold must be a number or a floating 0-d tensor, got {describe(threshold)}")
        if threshold.device != scores.device:
            raise ValueError(f"{op}: threshold must be on scores' device, {scores.device}, got {describe(threshold)}")
        return threshold.detach().to(scores.dtype)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"{op}: threshold must be a number or a 0-d tensor, got {threshold!r}")
    if threshold != threshold:
        raise ValueError(f"{op}: threshold must not be NaN")
    return torch.full((), threshold, dtype=scores.dtype, device=scores.device)


def flat_rows(positions: Tensor, tokens: int) -> Tensor:
    """Positions in sequences as rows of the matrix `[B * T, C]` that the batch is, as `gather_rows` takes them.

    Args:
        positions: `[B, S]`, int32, in `[0, T)`; negative ones stand for no row.
        tokens: T, tokens of a sequence.

    Returns:
        `[B * S]`, int32: `b * T + position`, or -1 for a negative position. Sorted but for these.

    Raises:
        ValueError, TypeError: positions' shape or dtype or tokens is off, or there are 2^31 rows or more.
    """
    if positions.dim() != 2:
        raise ValueError(f"flat_rows: positions must be [B, S], got {describe(positions)}")
    if positions.dtype != torch.int32:
        raise TypeError(f"flat_rows: positions must be int32, got {describe(positions)}")
    _check_tokens("flat_rows", tokens)
    batch = positions.shape[0]
    if batch * tokens >= _ROWS:
        raise ValueError(f"flat_rows: rows must be fewer than 2^31 to be int32, got {batch} x {tokens}")
    firsts = torch.arange(batch, dtype=torch.int32, device=positions.device)[:, None] * tokens
    return torch.where(positions < 0, -1, positions + firsts).flatten()


def block_scores(q: Tensor, k: Tensor, block_size: int = 64, starts: Tensor | None = None) -> Tensor:
    """The informativeness of each block of keys to the queries behind it, without the `[T, T]` matrix.

        I(b) = sum over blocks a >= b of queries of  max over i in a, j in b, j <= i of  sum over heads of
               max(0, q_i . k_j)

    Args:
        q: queries `[B, heads, T, D]`, rotated as attention takes them; float32, bfloat16, float16 or float64; any
            strides.
        k: keys `[B, key_value_heads, T, D]` in q's dtype; head h of q goes with head `h // (heads / key_value_heads)`.
        block_size: tokens per block.
        starts: `[B, T]`, int32: token i sees the keys from starts[i] to i, and none if that lies behind i. So packed
            documents and padding are told apart; None means from 0.

    Returns:
        `[B, T // block_size]` in float32, or float64 for float64. Queries of an unfinished last block count, its keys
        do not. Products are not scaled by `1 / sqrt(D)`.

    No gradient, and nothing is saved.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; nothing has run.

    Source: Wang et al., "LeMo", 2025 (JENGA, USENIX ATC 2025), sections 4.1 and 4.2.
    """
    op = "block_scores"
    _check_block_size(op, block_size)
    if q.dim() != 4:
        raise ValueError(f"{op}: q must be [B, heads, T, D], got {describe(q)}")
    if q.dtype not in FLOATING:
        raise TypeError(f"{op}: q must be float32, bfloat16, float16 or float64, got {describe(q)}")
    batch, heads, tokens, depth = q.shape
    if k.dim() != 4 or k.shape[0] != batch or k.shape[2:] != q.shape[2:]:
        raise ValueError(f"{op}: k must be [{batch}, key_value_heads, {tokens}, {depth}], got {describe(k)}")
    if k.shape[1] < 1 or heads % k.shape[1] != 0:
        raise ValueError(f"{op}: k must have a number of heads that divides q's, {heads}, got {describe(k)}")
    if k.dtype != q.dtype:
        raise TypeError(f"{op}: k must have q's dtype, {q.dtype}, got {describe(k)}")
    others = {"k": k, "starts": starts}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{op}: {name} must be on q's device, {q.device}, got {describe(tensor)}")
    if starts is not None and (starts.dtype != torch.int32 or starts.shape != (batch, tokens)):
        raise ValueError(f"{op}: starts must be int32 [{batch}, {tokens}], got {describe(starts)}")
    if transforms_active():
        return reference.block_scores(q.detach(), k.detach(), block_size, starts)
    kernel = backends.kernel(op, q.device.type, q.dtype, backends.forced_backend())
    return kernel(q.detach(), k.detach(), block_size, starts)  # type: ignore[no-any-return]
