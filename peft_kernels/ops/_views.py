"""What autograd asks of the results of our Functions."""

from __future__ import annotations

import torch
from torch import Tensor


def no_view(y: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """`y`, which nobody else has, in `shape` (its own, unless given), as no view: torch forbids changes in place of a
    view that a Function returns.

    Products of matrices are none; those of x `[..., K]` may be views of one.
    """
    shape = y.shape if shape is None else shape
    return y if y.dim() == len(shape) == 2 else torch.ops.aten._unsafe_view(y, shape)
