"""Inputs for the sampling of rows: norms with a few large ones, with zeros and equal ones, more rows asked than there.

Letters as in `peft_kernels/reference/wta_crs.py`: k of M rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .case import Case

OPERATORS = ("sampled_rows",)

_SIZES = ((0, 2), (1, 1), (9, 4), (300, 90), (4100, 1000))  # M, k


def cases(operator: str, dtype: torch.dtype) -> Iterator[Case]:
    """The calls that `operator` is checked on with norms of `dtype`."""
    # Small numbers, the same ones in every dtype, so that every row is decided.
    for seed, (total, k) in enumerate(_SIZES):
        generator = torch.Generator().manual_seed(seed)
        norms = torch.randint(0, 8, (total,), generator=generator).double()
        norms[: total // 50] = 128.0
        uniforms = torch.randint(0, 64, (k,), generator=generator).double() / 64
        yield Case(f"M={total} k={k}", (norms.to(dtype), uniforms))
