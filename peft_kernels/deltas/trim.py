"""Methods that take one delta and keep part of it: trims by magnitude, DARE, Model Breadcrumbs, Antidote's pruning.

All return a delta that is computed when it is read. The order of entries is by falling magnitude; of equal ones the one
at the smaller position comes first, and over several tensors the one in the tensor whose name sorts first. Fractions
count all elements of the base model's tensors, those without an entry included, and are rounded down.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..ops import deltas as operators
from ..ops.deltas import ALL_TIES
from ..reference.philox import dropout_scale
from . import thresholds
from .checkpoint import Checkpoint
from .delta import ComputedDelta, Delta, Entry, Spec
from .thresholds import Cut, Threshold

Scope = Literal["tensor", "global", "row"]


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError unless `value` is in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_scope(scope: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless `scope` is one of `allowed`."""
    if scope not in allowed:
        raise ValueError(f"scope must be one of {', '.join(allowed)}, got {scope!r}")


def trim(delta: Delta, density: float, *, scope: Scope = "tensor", outliers: float = 0.0) -> Delta:
    """Keeps the `density` largest changes, without the `outliers` largest of all.

    With `scope="global"` and no outliers this is the selection of LT-SFT (the top K of all changes) and of grafting
    (the top movement). Outliers give way where both do not fit.

    Args:
        delta: what to trim.
        density: fraction of elements to keep.
        scope: what fractions are of: each "tensor", each "row" (along the last dimension), or all tensors together
            ("global", which reads them two to five times more).
        outliers: fraction of elements, the largest, to drop.

    Raises:
        ValueError: a fraction is outside [0, 1], or the scope another one.
    """
    check_fraction("density", density)
    check_fraction("outliers", outliers)

    def ranks(count: int) -> tuple[int, int]:
        kept = int(density * count)
        first = min(int(outliers * count), count - kept)
        return first, first + kept

    options = f"density={density}, scope={scope}" + (f", outliers={outliers}" if outliers else "")
    return _with_ranks(delta, ranks, scope, f"trim({options})")


def graft(delta: Delta, density: float) -> Delta:
    """Keeps the top movement of the whole model: a trim with scope "global".

    Source: Panigrahi et al., "Task-Specific Skill Localization in Fine-tuned Language Models", ICML 2023, section 3.
    """
    return trim(delta, density, scope="global")


def breadcrumbs(delta: Delta, *, beta: float, gamma: float, scope: Scope = "row") -> Delta:
    """Model Breadcrumbs: drops the `gamma` largest and the `beta` smallest changes of every row.

    Args:
        delta: what to mask.
        beta: fraction of a row, the smallest, to drop.
        gamma: fraction of a row, the largest, to drop.
        scope: what the fractions are of; the method's is "row".

    Raises:
        ValueError: a fraction is outside [0, 1], or the scope another one.

    Source: Davari and Belilovsky, "Model Breadcrumbs", ECCV 2024, section 3.1.
    """
    check_fraction("beta", beta)
    check_fraction("gamma", gamma)

    def ranks(count: int) -> tuple[int, int]:
        first = int(gamma * count)
        return first, max(first, count - int(beta * count))

    return _with_ranks(delta, ranks, scope, f"breadcrumbs(beta={beta}, gamma={gamma}, scope={scope})")


def dare(delta: Delta, p: float, *, seed: int = 0) -> Delta:
    """DARE: drops each change with probability `p` and scales the others by `1 / (1 - p)`.

    The mask of a tensor is the dropout mask of its rows (`reference/philox.py`) for `seed` and an offset made of the
    tensor's name: it does not depend on other tensors, on what else the delta holds, or on threads. Deltas that are to
    be merged should have different seeds.

    Args:
        delta: what to drop from.
        p: probability of dropping, in [0, 1), honoured in steps of 2^-16.
        seed: any 64-bit number.

    Raises:
        ValueError: p is outside [0, 1).

    Source: Yu et al., "Language Models are Super Mario", ICML 2024, section 3.1.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must be in [0, 1), got {p}")

    def compute(name: str) -> Entry:
        entry = delta[name]
        state = torch.tensor([seed, name_offset(name)], dtype=torch.int64)
        mask = operators.random_mask(entry.packed_indices, entry.values, entry.spec.columns, p, state)
        return _compacted(entry, mask, dropout_scale(p))

    return ComputedDelta(delta.specs, compute, delta.base_model, (*delta.history, f"dare(p={p}, seed={seed})"))


def name_offset(name: str) -> int:
    """The Philox offset of a tensor: the first eight bytes of its name's SHA-256, as a signed number."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "little", signed=True)


def scaled(delta: Delta, factor: float) -> Delta:
    """All values times `factor`, rounded once; -1 negates exactly."""
    if not math.isfinite(factor):
        raise ValueError(f"factor must be finite, got {factor}")

    def compute(name: str) -> Entry:
        entry = delta[name]
        return _compacted(entry, torch.ones(entry.nnz, dtype=torch.bool), factor)

    return ComputedDelta(delta.specs, compute, delta.base_model, (*delta.history, f"scaled({factor})"))


def antidote(checkpoint: Checkpoint, norms: Mapping[str, Tensor], density: float) -> Delta:
    """The delta that zeroes, in every row of a weight, the `density` entries with the largest `|W| * norm`.

    With the norms of activations on harmful examples this is Antidote's pruning of harmful parameters.

    Args:
        checkpoint: where the weights are.
        norms: by name of a weight `[N, K]`, the norms `[K]` of its input's columns.
        density: fraction of a row to zero.

    Raises:
        KeyError: a name is not in the checkpoint.
        ValueError: a weight is not floating and 2-D, norms are not `[K]`, negative or not finite, or density is
            outside [0, 1].

    Source: Huang et al., "Antidote", ICML 2025, section 4; the score is that of Sun et al., "Wanda", ICLR 2024.
    """
    check_fraction("density", density)
    specs = {}
    for name, norm in norms.items():
        shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
        if len(shape) != 2 or dtype is None or not dtype.is_floating_point:
            raise ValueError(f"{name} must be a floating weight [N, K], got {dtype} {list(shape)}")
        if norm.shape != shape[1:] or not bool(torch.isfinite(norm).all()) or not bool((norm >= 0).all()):
            raise ValueError(f"norms[{name!r}] must be [{shape[1]}], finite and at least 0, got {list(norm.shape)}")
        specs[name] = Spec(shape, dtype, dtype)

    def compute(name: str) -> Entry:
        spec = specs[name]
        wide = spec.dtype == torch.float64
        entry = Entry(None, checkpoint.read(name).view(-1), spec)
        factors = norms[name].to(device="cpu", dtype=torch.float64 if wide else torch.float32).contiguous()
        last = int(density * spec.columns)
        mask = operators.row_mask(
            entry.packed_indices, entry.values, spec.columns, wide=wide, first=0, last=last, factors=factors
        )
        return _compacted(entry, mask, -1.0)

    return ComputedDelta(specs, compute, checkpoint.name, (f"antidote(density={density})",))


def _compacted(entry: Entry, mask: Tensor, factor: float = 1.0) -> Entry:
    indices, values = operators.compact(entry.packed_indices, entry.values, mask, factor)
    return replace(entry, indices=indices, values=values)


Ranks = Callable[[int], tuple[int, int]]
"""From a number of elements to the ranks that are kept of them, [first, last)."""


def _with_ranks(delta: Delta, ranks: Ranks, scope: str, step: str) -> Delta:
    """The entries of `delta` whose ranks within the scope are kept."""
    check_scope(scope, ("tensor", "global", "row"))
    whole = _global_cuts(delta, *ranks(delta.numel)) if scope == "global" else None

    def compute(name: str) -> Entry:
        entry = delta[name]
        wide = entry.values.dtype == torch.float64
        if scope == "row":
            first, last = ranks(entry.spec.columns)
            mask = operators.row_mask(
                entry.packed_indices, entry.values, entry.spec.columns, wide=wide, first=first, last=last
            )
            return _compacted(entry, mask)
        if whole is not None:
            wide, cuts = whole.wide, whole.of[name]
        else:
            found = _thresholds(lambda: [entry.values], ranks(entry.spec.numel), {entry.values.dtype})
            cuts = tuple(threshold.cut for threshold in found)
        mask = operators.magnitude_mask(entry.values, wide=wide, first=cuts[0], last=cuts[1])
        return _compacted(entry, mask)

    return ComputedDelta(delta.specs, compute, delta.base_model, (*delta.history, step))


@dataclass(frozen=True)
class _Cuts:
    """The cuts that hold for each tensor of a delta, so that together they end at the ranks of the whole."""

    wide: bool
    of: dict[str, tuple[Cut, ...]]


def _thresholds(
    tensors: Callable[[], Iterable[Tensor]], ranks: tuple[int, int], dtypes: set[torch.dtype]
) -> list[Threshold]:
    wide, short = torch.float64 in dtypes, dtypes <= {torch.bfloat16}
    wanted = [rank for rank in ranks if rank > 0]
    found = iter(thresholds.thresholds(tensors, wanted, wide=wide, short=short) if wanted else [])
    return [next(found) if rank > 0 else thresholds.nothing(wide) for rank in ranks]


def _global_cuts(delta: Delta, first: int, last: int) -> _Cuts:
    dtypes = {spec.values_dtype for spec in delta.specs.values()}
    wide = torch.float64 in dtypes
    found = _thresholds(lambda: (entry.values for entry in delta.values()), (first, last), dtypes)
    cuts: dict[str, list[Cut]] = {name: [] for name in delta}
    if all(threshold.ties == threshold.equal for threshold in found):
        return _Cuts(wide, {name: tuple(threshold.cut for threshold in found) for name in delta})
    left = [threshold.ties for threshold in found]
    for name, entry in delta.items():
        for i, threshold in enumerate(found):
            equal = thresholds.equal_to(entry.values, threshold.key, wide=wide)
            taken = min(left[i], equal)
            left[i] -= taken
            cuts[name].append((threshold.key, ALL_TIES if taken == equal else taken))
    return _Cuts(wide, {name: tuple(pair) for name, pair in cuts.items()})
