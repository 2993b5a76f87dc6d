"""What autograd asks of the results of our Functions."""

from __future__ import annotations

import torch
from torch import Tensor


def no_view(y: Tensor) -> Tensor:
    """`y`, which nobody else has, as no view: torch forbids changes in place of a view that a Function returns.

    Products of matrices are none; those of x `[..., K]` may be views of one.
    """
    return y if y.dim() == 2 else torch.ops.aten._unsafe_view(y, y.shape)
