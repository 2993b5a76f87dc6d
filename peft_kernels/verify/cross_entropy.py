"""Inputs for the cross entropy of rows of logits: odd widths, rows without a label, large logits.

Letters as in `peft_kernels/reference/cross_entropy.py`: C rows, V logits of a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .case import Case

OPERATORS = ("cross_entropy_rows_",)

_SHAPES = ((0, 5), (1, 1), (7, 33), (5, 1000), (3, 50257))  # C, V
_SPREADS = (1.0, 8.0)


def cases(operator: str, dtype: torch.dtype) -> Iterator[Case]:
    """The calls that `operator` is checked on with logits of `dtype`."""
    for seed, (rows, width) in enumerate(_SHAPES):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, width, (rows,), generator=generator)
        labels[1::3] = -1
        for spread in _SPREADS:
            logits = spread * torch.randn((rows, width), generator=generator, dtype=torch.float64)
            yield Case(f"C={rows} V={width} spread {spread}", (logits.to(dtype), labels, 0.5), (0,))
