"""Methods that merge several deltas of one base model: sums, TIES-Merging, PCB-Merging.

All return a delta that is computed when it is read. A tensor that a delta has no entry for counts as zeros there.
Sums are formed in float32, or float64 where a delta holds that, in the order of the deltas, and rounded at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..ops import deltas as operators
from . import thresholds
from .delta import ComputedDelta, Delta, Entry, Spec, common_base, common_history, common_specs, empty_entry
from .trim import check_fraction, check_scope, trim

_MOST_DELTAS = 64


def linear(
    deltas: Sequence[Delta], weights: Sequence[float] | None = None, *, dtype: torch.dtype | None = None
) -> Delta:
    """Task arithmetic: the weighted sum. With weights of 1 it is how sparse fine-tunings (LT-SFT) compose.

    Args:
        deltas: what to add up, at most 64.
        weights: a factor for each, by default 1; negative ones take away.
        dtype: of the result's values; by default theirs, promoted.

    Raises:
        ValueError: no deltas, a wrong number of weights, one that is not finite, or shapes that differ.

    Sources: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023; Ansell et al., "Composable Sparse
    Fine-Tuning for Cross-Lingual Transfer", ACL 2022.
    """
    factors = _weights(deltas, weights)
    return _merged(deltas, dtype, f"linear(weights={factors})", _with_weights(operators.sum_of, factors))


def compose(deltas: Sequence[Delta]) -> Delta:
    """LT-SFT composition: the sum of deltas, as of a language's and a task's."""
    return linear(deltas)


def ties(
    deltas: Sequence[Delta],
    *,
    density: float | None = None,
    weights: Sequence[float] | None = None,
    scope: Literal["tensor", "global"] = "tensor",
    dtype: torch.dtype | None = None,
) -> Delta:
    """TIES-Merging: trim each delta, elect a sign per position, average the values that have it.

    The sign of the weighted sum is elected, the positive one where the sum is zero. The average is weighted too.

    Args:
        deltas: what to merge, at most 64.
        density: fraction of elements that each delta keeps, by magnitude; None where they are trimmed already, as
            after `dare` or `breadcrumbs`.
        weights: a factor above 0 for each, by default 1.
        scope: what density is of, each "tensor" or all tensors of a delta together ("global", the paper's).
        dtype: of the result's values; by default theirs, promoted.

    Raises:
        ValueError: an argument is out of range, or shapes differ.

    Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, algorithm 1.
    """
    check_scope(scope, ("tensor", "global"))
    factors = _weights(deltas, weights)
    if not all(factor > 0 for factor in factors):
        raise ValueError(f"weights must be above 0, got {factors}")
    trimmed = list(deltas) if density is None else [trim(delta, density, scope=scope) for delta in deltas]
    return _merged(trimmed, dtype, f"ties(weights={factors})", _with_weights(operators.ties, factors))


def pcb(
    deltas: Sequence[Delta],
    *,
    density: float,
    weights: Sequence[float] | None = None,
    clamp: float = 1e-4,
    scope: Literal["tensor", "global"] = "global",
    dtype: torch.dtype | None = None,
) -> Delta:
    """PCB-Merging: weigh every entry of N deltas by how it competes within its delta and with the other deltas.

    With the magnitudes of each delta tau clamped to their quantiles `clamp` and `1 - clamp`, and `norm` mapping its
    smallest number to 0 and its largest to 1,

        score = exp(N norm(|tau|)^2) tanh(tau * sum over deltas of tau)       intra- and inter-balancing
        scale = norm(max(score, its quantile 1 - density))                    drop and rescale
        merged = sum of weight sign(tau) |tau| scale / sum of scale           |tau| clamped, sums over deltas

    Args:
        deltas: what to merge, at most 64.
        density: fraction of elements that each delta keeps, by score.
        weights: a factor for each, by default 1 (the paper's lambda).
        clamp: fraction of a delta's elements that are clamped at either end.
        scope: what quantiles are of, each "tensor" or all tensors together ("global", the paper's, which reads the
            deltas four more times).
        dtype: of the result's values; by default theirs, promoted.

    Raises:
        ValueError: an argument is out of range, or shapes differ.

    Source: Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS 2024, section 3.2, with the
    activations and the clamping of the authors' code.
    """
    check_fraction("density", density)
    check_scope(scope, ("tensor", "global"))
    if not 0.0 <= clamp < 0.5:
        raise ValueError(f"clamp must be in [0, 0.5), got {clamp}")
    factors = _weights(deltas, weights)
    specs = common_specs(deltas)
    whole = _Contest(deltas, specs, list(specs), density, clamp, factors).competition() if scope == "global" else None
    wide = any(spec.values_dtype == torch.float64 for spec in specs.values())

    def merge(name: str, entries: list[Entry], numel: int, result: torch.dtype) -> tuple[Tensor, Tensor]:
        competition = whole
        if competition is None:
            held = [_Held(name, entry) for entry in entries]
            competition = _Contest(held, specs, [name], density, clamp, factors).competition()
        elif wide:
            entries = _in_one_dtype(entries)
        return operators.compete(*_tensors(entries), competition, numel, result)

    step = f"pcb(density={density}, clamp={clamp}, scope={scope}, weights={factors})"
    return _merged(deltas, dtype, step, merge)


_Merge = Callable[[str, list[Entry], int, torch.dtype], tuple[Tensor, Tensor]]


def _weights(deltas: Sequence[Delta], weights: Sequence[float] | None) -> list[float]:
    if not 1 <= len(deltas) <= _MOST_DELTAS:
        raise ValueError(f"deltas must be 1 to {_MOST_DELTAS}, got {len(deltas)}")
    factors = [1.0] * len(deltas) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(deltas):
        raise ValueError(f"weights must be as many as deltas, {len(deltas)}, got {len(factors)}")
    if not all(math.isfinite(factor) for factor in factors):
        raise ValueError(f"weights must be finite, got {factors}")
    return factors


def _with_weights(operator: Callable[..., tuple[Tensor, Tensor]], weights: list[float]) -> _Merge:
    return lambda _, entries, numel, dtype: operator(*_tensors(entries), weights, numel, dtype)


def _tensors(entries: Sequence[Entry]) -> tuple[list[Tensor], list[Tensor]]:
    return [entry.packed_indices for entry in entries], [entry.values for entry in entries]


def _merged(deltas: Sequence[Delta], dtype: torch.dtype | None, step: str, merge: _Merge) -> Delta:
    specs = common_specs(deltas)
    if dtype is not None:
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating one, got {dtype}")
        specs = {name: replace(spec, values_dtype=dtype) for name, spec in specs.items()}

    def compute(name: str) -> Entry:
        spec = specs[name]
        entries = [delta[name] if name in delta else empty_entry(spec) for delta in deltas]
        indices, values = merge(name, entries, spec.numel, spec.values_dtype)
        return Entry(indices, values, spec)

    return ComputedDelta(specs, compute, common_base(deltas), common_history(deltas, step))


def _in_one_dtype(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with values in float64: what one contest is held in, if one of its tensors is."""
    return [replace(entry, values=entry.values.to(torch.float64)) for entry in entries]


class _Held(Delta):
    """One entry that has been read, as a delta."""

    def __init__(self, name: str, entry: Entry) -> None:
        super().__init__({name: entry.spec}, None, ())
        self._entry = entry

    def entry(self, name: str) -> Entry:
        return self._entry


@dataclass(frozen=True)
class _Contest:
    """PCB-Merging's quantiles over some tensors of several deltas, by counting."""

    deltas: Sequence[Delta]
    specs: dict[str, Spec]
    names: list[str]
    density: float
    clamp: float
    weights: list[float]

    def competition(self) -> Tensor:
        """`[deltas, 5]` float64: lowest and highest magnitude, threshold and largest of the scores, weight."""
        rows = [
            [*self._clamps(delta), 0.0, 0.0, weight] for delta, weight in zip(self.deltas, self.weights, strict=True)
        ]
        competition = torch.tensor(rows, dtype=torch.float64)
        if self._numel > 0:
            competition[:, 2:4] = torch.tensor(self._scores(competition), dtype=torch.float64)
        return competition

    @property
    def _numel(self) -> int:
        return sum(self.specs[name].numel for name in self.names)

    def _clamps(self, delta: Delta) -> tuple[float, float]:
        """The magnitudes at the two quantiles; positions without an entry are zeros."""
        count = self._numel
        if count == 0:
            return 0.0, 0.0
        dtypes = {delta.specs[name].values_dtype for name in self.names if name in delta}
        wide = torch.float64 in dtypes
        # Ranks count from 1 at the largest; place i of rising magnitudes is rank count - i.
        places = int(count * self.clamp), max(0, int(count * (1 - self.clamp) - 1))
        found = thresholds.thresholds(
            lambda: (delta[name].values for name in self.names if name in delta),
            [count - place for place in places],
            wide=wide,
            short=bool(dtypes) and dtypes <= {torch.bfloat16},
        )
        low, high = (thresholds.magnitude(threshold.key, wide=wide) for threshold in found)
        return min(low, high), high

    def _entries(self, name: str) -> list[Entry]:
        entries = [delta[name] if name in delta else empty_entry(self.specs[name]) for delta in self.deltas]
        return _in_one_dtype(entries) if self._wide else entries

    @property
    def _wide(self) -> bool:
        dtypes = [delta.specs[name].values_dtype for delta in self.deltas for name in self.names if name in delta]
        return torch.float64 in dtypes

    def _scores(self, competition: Tensor) -> list[tuple[float, float]]:
        """The threshold and the largest score of each delta."""
        wide = self._wide
        zero = thresholds.zero_score(wide)
        size = 64 if wide else 32
        largest = torch.zeros(len(self.deltas), dtype=torch.int64)
        zeros: list[int] = []

        def count(shift: int, bits: int, prefixes: Sequence[int]) -> list[Tensor]:
            counts = torch.zeros(len(self.deltas) << bits, dtype=torch.int64)
            for name in self.names:
                indices, values = _tensors(self._entries(name))
                operators.count_scores_(
                    counts, largest, indices, values, competition, self.specs[name].numel,
                    shift=shift, bits=bits, prefixes=prefixes,
                )  # fmt: skip
            rows = list(counts.view(len(self.deltas), -1))
            if not zeros:  # the first pass counts every entry
                zeros.extend(self._numel - int(row.sum()) for row in rows)
            for row, prefix, implied in zip(rows, prefixes, zeros, strict=True):
                if zero >> (shift + bits) == prefix:
                    row[(zero >> shift) & (2**bits - 1)] += implied
            return rows

        rank = self._numel - min(self._numel - 1, int(self._numel * (1 - self.density)))
        found = thresholds.search(count, thresholds.score_levels(wide), [rank] * len(self.deltas))
        result = []
        for threshold, top, implied in zip(found, largest.tolist(), zeros, strict=True):
            winner = max(top % 2**size, zero if implied else 0)
            result.append((thresholds.score(threshold.key, wide=wide), thresholds.score(winner, wide=wide)))
        return result
