"""Exact order statistics of magnitudes and scores by counting, without sorting.

A key (see `peft_kernels/reference/deltas.py`) is found from its upper bits down: one pass counts the 16 upper bits, the
next one the bits below, only of those keys that share the upper ones, and so on: two levels for float32, four for
float64, one for values that are all bfloat16. A pass reads every entry once and needs 2^16 counters.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import deltas as operators
from ..ops.deltas import ALL_TIES

_LEVELS = {False: ((15, 16), (0, 15)), True: ((47, 16), (31, 16), (15, 16), (0, 15))}
_SCORE_LEVELS = {False: ((16, 16), (0, 16)), True: ((48, 16), (32, 16), (16, 16), (0, 16))}

Cut = tuple[int, int]
"""The end of a top of ranks: (key, how many of those with this key are in it)."""


@dataclass(frozen=True)
class Threshold:
    """The key of a rank.

    Attributes:
        key: of the entry with that rank.
        ties: how many entries with this key have that rank or one before it.
        equal: how many entries have this key in all.
    """

    key: int
    ties: int
    equal: int

    @property
    def cut(self) -> Cut:
        """The cut behind that rank."""
        return self.key, ALL_TIES if self.ties == self.equal else self.ties


def nothing(wide: bool) -> Threshold:
    """The cut before the first rank: at a key that no number has."""
    return Threshold(2**63 - 1 if wide else 2**31 - 1, 0, 0)


_BEYOND = Threshold(0, 0, 0)
"""Behind the last key: everything is in the top."""

Count = Callable[[int, int, Sequence[int]], Sequence[Tensor]]
"""One pass: counts of bits [shift, shift + bits) of the keys, for each of several prefixes."""


def search(count: Count, levels: Iterable[tuple[int, int]], ranks: Sequence[int]) -> list[Threshold]:
    """The thresholds at `ranks`, counted from 1 at the largest key; key 0 and no ties where there are fewer keys."""
    prefixes, before = [0] * len(ranks), [0] * len(ranks)
    found: list[Threshold] = [_BEYOND] * len(ranks)
    beyond = [False] * len(ranks)
    for shift, bits in levels:
        for i, counts in enumerate(count(shift, bits, prefixes)):
            falling = counts.flip(0).cumsum(0)
            place = int(torch.searchsorted(falling, ranks[i] - before[i]))
            beyond[i] |= place == 2**bits
            if beyond[i]:
                continue
            equal = int(counts[2**bits - 1 - place])
            before[i] += int(falling[place]) - equal
            prefixes[i] = prefixes[i] << bits | (2**bits - 1 - place)
            found[i] = Threshold(prefixes[i], ranks[i] - before[i], equal)
    return found


def thresholds(
    tensors: Callable[[], Iterable[Tensor]], ranks: Sequence[int], *, wide: bool, short: bool
) -> list[Threshold]:
    """The thresholds of magnitudes at `ranks` over the values of several tensors.

    Args:
        tensors: yields the values, all of them anew at each call.
        ranks: counted from 1 at the largest magnitude.
        wide: keys of float64.
        short: all values are bfloat16, whose 15 lower bits as float32 are zero.
    """
    levels = _LEVELS[False][:1] if short and not wide else _LEVELS[wide]

    def count(shift: int, bits: int, prefixes: Sequence[int]) -> list[Tensor]:
        counts = {prefix: torch.zeros(2**bits, dtype=torch.int64) for prefix in prefixes}
        for values in tensors():
            for prefix, bins in counts.items():
                operators.count_keys_(bins, values, wide=wide, shift=shift, bits=bits, prefix=prefix)
        return [counts[prefix] for prefix in prefixes]

    found = search(count, levels, ranks)
    if short and not wide:
        return [Threshold(threshold.key << 15, threshold.ties, threshold.equal) for threshold in found]
    return found


def equal_to(values: Tensor, key: int, *, wide: bool) -> int:
    """How many of `values` have the key."""
    counts = torch.zeros(2, dtype=torch.int64)
    operators.count_keys_(counts, values, wide=wide, shift=0, bits=1, prefix=key >> 1)
    return int(counts[key & 1])


def magnitude(key: int, *, wide: bool) -> float:
    """The number whose key it is."""
    return _number(key, wide)


def _number(bits: int, wide: bool) -> float:
    formats = ("<Q", "<d") if wide else ("<I", "<f")
    number: float = struct.unpack(formats[1], struct.pack(formats[0], bits))[0]
    return number


def score(key: int, *, wide: bool) -> float:
    """The number whose ordered key it is, see `reference.deltas.ordered_keys`."""
    size = 64 if wide else 32
    key %= 2**size
    sign = 2 ** (size - 1)
    return _number(key - sign if key >= sign else 2**size - 1 - key, wide)


def zero_score(wide: bool) -> int:
    """The ordered key of zero."""
    return 2**63 if wide else 2**31


def score_levels(wide: bool) -> tuple[tuple[int, int], ...]:
    """(shift, bits) of the passes that find an ordered key."""
    return _SCORE_LEVELS[wide]
