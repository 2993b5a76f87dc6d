"""The delta algebra in plain PyTorch: the definition of each operator of the family.

A delta in one tensor of `numel` elements is `values [nnz]` at `indices [nnz]`, sorted, unique, flat positions; with
`indices` of shape `[0]` there is a value at every position.

The *key* of a value is the bit pattern of its magnitude, read as an integer: it orders as magnitudes do. Keys are those
of float32 (31 bits), or of float64 (63 bits) where a call is `wide`. The *rank* of an entry counts from the largest
magnitude on; of equal magnitudes the one at the smaller position comes first. A *cut* is the end of a top of ranks, as
(key, ties): all entries with larger keys and the first `ties` with this one. Zeros are in no selection.

Sources: Yu et al., "Language Models are Super Mario", ICML 2024 (DARE); Yadav et al., "TIES-Merging", NeurIPS 2023;
Davari and Belilovsky, "Model Breadcrumbs", ECCV 2024; Du et al., "Parameter Competition Balancing for Model Merging",
NeurIPS 2024.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lora import accumulation_dtype
from .philox import dropout_mask

ALL_TIES = 2**63 - 1
"""As many ties as there are."""

_Merged = tuple[Tensor, Tensor]


def working_dtype(values: list[Tensor]) -> torch.dtype:
    """What several deltas are added up in: float64 where one of them is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in values) else torch.float32


def index_dtype(numel: int) -> torch.dtype:
    """The dtype of positions in a tensor of `numel` elements."""
    return torch.int64 if numel > 2**31 - 1 else torch.int32


def keys(values: Tensor, wide: bool) -> Tensor:
    """The bit patterns of magnitudes, as int64."""
    if wide:
        return values.to(torch.float64).abs().view(torch.int64)
    return values.to(torch.float32).abs().view(torch.int32).to(torch.int64)


def positions(indices: Tensor, values: Tensor) -> Tensor:
    """Where the entries are, as int64."""
    if indices.numel() == 0:
        return torch.arange(values.numel(), device=values.device)
    return indices.to(torch.int64)


def delta_count_keys_(counts: Tensor, values: Tensor, wide: bool, shift: int, bits: int, prefix: int) -> None:
    """Adds to `counts [2^bits]` how many keys of `values [nnz]` fall into each bin.

    The bin is bits `shift` to `shift + bits` of a key; only keys whose bits above are `prefix` count.
    """
    patterns = keys(values, wide)
    patterns = patterns[patterns >> (shift + bits) == prefix]
    counts.add_(torch.bincount((patterns >> shift) & (2**bits - 1), minlength=2**bits))


def _in_top(patterns: Tensor, key: int, ties: int) -> Tensor:
    equal = patterns == key
    return (patterns > key) | (equal & (equal.cumsum(0) <= ties))


def delta_magnitude_mask(
    values: Tensor, wide: bool, first_key: int, first_ties: int, last_key: int, last_ties: int
) -> Tensor:
    """Which of `values [nnz]` lie within the top that the last cut ends, but not in that of the first; bool `[nnz]`."""
    patterns = keys(values, wide)
    inside = _in_top(patterns, last_key, last_ties) & ~_in_top(patterns, first_key, first_ties)
    return inside & (patterns != 0)


def delta_row_mask(
    indices: Tensor, values: Tensor, factors: Tensor | None, columns: int, wide: bool, first: int, last: int
) -> Tensor:
    """Which entries have a rank in [first, last) within their row; bool `[nnz]`.

    Ranks are by `|values|`, or `|values * factors[column]|` with factors `[columns]` (float32, or float64 when wide).
    """
    at = positions(indices, values)
    dtype = torch.float64 if wide else torch.float32
    scores = values.to(dtype)
    if factors is not None:
        scores = scores * factors[at % columns]
    patterns = keys(scores, wide)
    # Sorted by row, then by falling magnitude; stable, so that equal ones stay in the order of positions.
    order = torch.argsort(patterns, descending=True, stable=True)
    order = order[torch.argsort((at // columns)[order], stable=True)]
    row = (at // columns)[order]
    rank = torch.arange(row.numel(), device=row.device) - torch.searchsorted(row, row)
    mask = torch.empty_like(row, dtype=torch.bool)
    mask[order] = (rank >= first) & (rank < last)
    return mask & (patterns != 0)


def delta_random_mask(indices: Tensor, values: Tensor, columns: int, dropout_p: float, rng_state: Tensor) -> Tensor:
    """Which entries the dropout mask of `[rows, columns]` keeps; bool `[nnz]`. See `reference/philox.py`."""
    at = positions(indices, values)
    rows = int(at[-1]) // columns + 1 if at.numel() else 0
    return dropout_mask(rows, columns, dropout_p, rng_state).view(-1)[at]


def delta_compact(indices: Tensor, values: Tensor, mask: Tensor, factor: float) -> _Merged:
    """The positions, and the values times `factor` (rounded once), where `mask [nnz]` holds."""
    if indices.numel() == 0 and values.numel() > 0:
        indices = positions(indices, values).to(index_dtype(values.numel()))
    kept = values[mask]
    if factor != 1.0:
        kept = (kept.to(accumulation_dtype(values.dtype)) * factor).to(values.dtype)
    return indices[mask], kept


def _columns(indices: list[Tensor], values: list[Tensor], numel: int) -> tuple[Tensor, list[Tensor]]:
    """The positions at which any delta has an entry, and each delta's numbers there, zero where it has none."""
    union = torch.unique(torch.cat([positions(i, v) for i, v in zip(indices, values, strict=True)]))
    columns = []
    for index, value in zip(indices, values, strict=True):
        column = torch.zeros(numel, dtype=working_dtype(values), device=value.device)
        column[positions(index, value)] = value.to(column.dtype)
        columns.append(column[union])
    return union, columns


def _packed(union: Tensor, merged: Tensor, numel: int, dtype: torch.dtype) -> _Merged:
    kept = merged != 0
    return union[kept].to(index_dtype(numel)), merged[kept].to(dtype)


def _weighted_sum(columns: list[Tensor], weights: list[float]) -> Tensor:
    total = weights[0] * columns[0]
    for column, weight in zip(columns[1:], weights[1:], strict=True):
        total = total + weight * column
    return total


def delta_sum(
    indices: list[Tensor], values: list[Tensor], weights: list[float], numel: int, dtype: torch.dtype
) -> _Merged:
    """`sum over d of weights[d] delta[d]` in the order of d, where it is not zero, rounded to `dtype` at the end."""
    union, columns = _columns(indices, values, numel)
    return _packed(union, _weighted_sum(columns, weights), numel, dtype)


def delta_ties(
    indices: list[Tensor], values: list[Tensor], weights: list[float], numel: int, dtype: torch.dtype
) -> _Merged:
    """TIES-Merging of trimmed deltas: elect a sign, average what agrees with it.

    The sign of `sum over d of weights[d] delta[d]` is elected, the positive one when the sum is zero. The result is the
    mean, weighted, of the values that have it. Weights are positive.
    """
    union, columns = _columns(indices, values, numel)
    positive = _weighted_sum(columns, weights) >= 0
    total, share = torch.zeros_like(columns[0]), torch.zeros_like(columns[0])
    for column, weight in zip(columns, weights, strict=True):
        agrees = torch.where(positive, column > 0, column < 0)
        total = total + torch.where(agrees, weight * column, 0)
        share = share + torch.where(agrees, torch.full_like(share, weight), 0)
    return _packed(union, torch.where(share > 0, total / share, 0), numel, dtype)


def _clamped(column: Tensor, lowest: float, highest: float) -> Tensor:
    return column.abs().clamp(lowest, highest)


def scores(columns: list[Tensor], competition: Tensor) -> list[Tensor]:
    """The competition scores `exp(N norm(|tau|)^2) tanh(tau sum tau)` of N deltas, each `[positions]`.

    `norm` maps magnitudes, clamped to competition's [lowest, highest], to [0, 1]; all of it 0 where both are equal.
    """
    total = columns[0]
    for column in columns[1:]:
        total = total + column
    result = []
    for column, (lowest, highest, *_) in zip(columns, competition.tolist(), strict=True):
        width = (torch.tensor(highest, dtype=column.dtype) - torch.tensor(lowest, dtype=column.dtype)).item()
        norm = (_clamped(column, lowest, highest) - lowest) / width if width > 0 else torch.zeros_like(column)
        result.append(torch.exp(len(columns) * norm.square()) * torch.tanh(column * total))
    return result


def ordered_keys(numbers: Tensor) -> Tensor:
    """Bit patterns that order as the numbers do, as int64: of float32 in [0, 2^32), of float64 modulo 2^64."""
    numbers = numbers + 0.0  # no negative zero
    if numbers.dtype == torch.float64:
        patterns = numbers.view(torch.int64)
        return torch.where(patterns < 0, ~patterns, patterns ^ (-(2**63)))
    patterns = numbers.view(torch.int32).to(torch.int64)
    return torch.where(patterns < 0, ~patterns, patterns + 2**31)


def delta_count_scores_(
    counts: Tensor,
    largest: Tensor,
    indices: list[Tensor],
    values: list[Tensor],
    competition: Tensor,
    numel: int,
    shift: int,
    bits: int,
    prefixes: list[int],
) -> None:
    """Counts the scores of every delta at its own entries that are not zero.

    Adds to `counts [deltas * 2^bits]` how many ordered keys fall into each bin, as `delta_count_keys_` does,
    and raises `largest [deltas]` to the largest key, as an unsigned number of 32 or, in float64, 64 bits.
    """
    _, columns = _columns(indices, values, numel)
    size, key_bits = 2**bits, 64 if working_dtype(values) == torch.float64 else 32
    for d, (column, score) in enumerate(zip(columns, scores(columns, competition), strict=True)):
        patterns = ordered_keys(score[column != 0])
        if patterns.numel():
            top = patterns[_unsigned_order(patterns).argmax()]
            if _unsigned_order(top) > _unsigned_order(largest[d]):
                largest[d] = top
        if shift + bits < key_bits:
            above = (patterns >> (shift + bits)) & (2 ** (key_bits - shift - bits) - 1)
            patterns = patterns[above == prefixes[d]]
        bins = (patterns >> shift) & (size - 1)
        counts.view(-1)[d * size : (d + 1) * size].add_(torch.bincount(bins, minlength=size))


def _unsigned_order(patterns: Tensor) -> Tensor:
    return patterns ^ (-(2**63))


def delta_compete(
    indices: list[Tensor], values: list[Tensor], competition: Tensor, numel: int, dtype: torch.dtype
) -> _Merged:
    """PCB-Merging's last step, with `competition [deltas, 5]`: lowest, highest, threshold, winner, weight.

    The scale of an entry is its score's place between the threshold (0, and below it) and the winner (1). The result is
    `sum of weight sign(tau) clamp(|tau|) scale / max(sum of scale, 1e-12)`.
    """
    union, columns = _columns(indices, values, numel)
    total, share = torch.zeros_like(columns[0]), torch.zeros_like(columns[0])
    rows = competition.tolist()
    for column, score, row in zip(columns, scores(columns, competition), rows, strict=True):
        lowest, highest, threshold, winner, weight = row
        width = (torch.tensor(winner, dtype=column.dtype) - torch.tensor(threshold, dtype=column.dtype)).item()
        scale = (score - threshold).clamp(min=0) / width if width > 0 else torch.zeros_like(score)
        total = total + weight * (column.sign() * _clamped(column, lowest, highest) * scale)
        share = share + scale
    return _packed(union, total / share.clamp(min=1e-12), numel, dtype)
