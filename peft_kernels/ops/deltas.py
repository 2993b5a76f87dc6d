"""The operators of the delta algebra and their backends; formulas in `peft_kernels/reference/deltas.py`.

They trust in sorted, unique indices within range, which `ops.sparse_delta.check_indices` checks where deltas are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import kernel
from ..reference import deltas as reference
from ..reference.deltas import ALL_TIES, index_dtype, working_dtype
from ._register import fake_in_place, register_operator

__all__ = [
    "ALL_TIES",
    "compact",
    "compete",
    "count_keys_",
    "count_scores_",
    "index_dtype",
    "magnitude_mask",
    "random_mask",
    "row_mask",
    "sum_of",
    "ties",
    "working_dtype",
]

_Merged = tuple[Tensor, Tensor]


def _kernel(name: str, values: Tensor) -> Any:
    return kernel(name, values.device.type, values.dtype)


def count_keys_(counts: Tensor, values: Tensor, *, wide: bool, shift: int, bits: int, prefix: int) -> None:
    """Adds to `counts [2^bits]` (int64) how many keys of `values [nnz]` fall into each bin of those with `prefix`."""
    _kernel("delta_count_keys_", values)(counts, values, wide, shift, bits, prefix)


def magnitude_mask(values: Tensor, *, wide: bool, first: tuple[int, int], last: tuple[int, int]) -> Tensor:
    """Which `values [nnz]` lie between two cuts, (key, ties) each; bool `[nnz]`."""
    mask: Tensor = _kernel("delta_magnitude_mask", values)(values, wide, *first, *last)
    return mask


def row_mask(
    indices: Tensor, values: Tensor, columns: int, *, wide: bool, first: int, last: int, factors: Tensor | None = None
) -> Tensor:
    """Which entries have ranks [first, last) by magnitude, times `factors [columns]`, in their row; bool `[nnz]`."""
    mask: Tensor = _kernel("delta_row_mask", values)(indices, values, factors, columns, wide, first, last)
    return mask


def random_mask(indices: Tensor, values: Tensor, columns: int, dropout_p: float, rng_state: Tensor) -> Tensor:
    """Which entries the dropout mask of `[rows, columns]` keeps; bool `[nnz]`."""
    mask: Tensor = _kernel("delta_random_mask", values)(indices, values, columns, dropout_p, rng_state)
    return mask


def compact(indices: Tensor, values: Tensor, mask: Tensor, factor: float = 1.0) -> _Merged:
    """The indices, and the values times `factor`, where `mask [nnz]` holds."""
    packed: _Merged = _kernel("delta_compact", values)(indices, values, mask, factor)
    return packed


def sum_of(
    indices: Sequence[Tensor], values: Sequence[Tensor], weights: Sequence[float], numel: int, dtype: torch.dtype
) -> _Merged:
    """`sum over d of weights[d] delta[d]`, packed, in `dtype`."""
    merged: _Merged = _kernel("delta_sum", values[0])(list(indices), list(values), list(weights), numel, dtype)
    return merged


def ties(
    indices: Sequence[Tensor], values: Sequence[Tensor], weights: Sequence[float], numel: int, dtype: torch.dtype
) -> _Merged:
    """TIES-Merging of trimmed deltas, packed, in `dtype`."""
    merged: _Merged = _kernel("delta_ties", values[0])(list(indices), list(values), list(weights), numel, dtype)
    return merged


def count_scores_(
    counts: Tensor,
    largest: Tensor,
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    competition: Tensor,
    numel: int,
    *,
    shift: int,
    bits: int,
    prefixes: Sequence[int],
) -> None:
    """Counts competition scores into `counts [deltas * 2^bits]` and raises `largest [deltas]`, both int64."""
    _kernel("delta_count_scores_", values[0])(
        counts, largest, list(indices), list(values), competition, numel, shift, bits, list(prefixes)
    )


def compete(
    indices: Sequence[Tensor], values: Sequence[Tensor], competition: Tensor, numel: int, dtype: torch.dtype
) -> _Merged:
    """PCB-Merging by `competition [deltas, 5]`, packed, in `dtype`."""
    merged: _Merged = _kernel("delta_compete", values[0])(list(indices), list(values), competition, numel, dtype)
    return merged


def _fake_magnitude_mask(values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(values.shape, dtype=torch.bool)


def _fake_entry_mask(indices: Tensor, values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(values.shape, dtype=torch.bool)


def _new_entries(like: Tensor, index: torch.dtype, value: torch.dtype) -> _Merged:
    count = torch.library.get_ctx().new_dynamic_size()
    return like.new_empty(count, dtype=index), like.new_empty(count, dtype=value)


def _fake_compact(indices: Tensor, values: Tensor, mask: Tensor, factor: float) -> _Merged:
    dense = indices.numel() == 0 and values.numel() > 0
    return _new_entries(values, index_dtype(values.numel()) if dense else indices.dtype, values.dtype)


def _fake_merge(indices: list[Tensor], values: list[Tensor], weights: Any, numel: int, dtype: torch.dtype) -> _Merged:
    return _new_entries(values[0], index_dtype(numel), dtype)


def _register() -> None:
    for name, fake in (
        ("delta_count_keys_", fake_in_place),
        ("delta_magnitude_mask", _fake_magnitude_mask),
        ("delta_row_mask", _fake_entry_mask),
        ("delta_random_mask", _fake_entry_mask),
        ("delta_compact", _fake_compact),
        ("delta_sum", _fake_merge),
        ("delta_ties", _fake_merge),
        ("delta_count_scores_", fake_in_place),
        ("delta_compete", _fake_merge),
    ):
        definition = getattr(reference, name)
        register_operator(name, reference=definition, fake=fake, cuda=False, triton="no Triton kernel yet")


_register()
