"""A slice of a weight: the rows or columns of W `[N, K]` that train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from .units import Dim


@dataclass(frozen=True, eq=False)
class Slice:
    """Channels of one layer.

    Attributes:
        indices: `[s]` int64 on the CPU, sorted and unique.
        dim: "input" for the columns `W[:, indices]`, "output" for the rows `W[indices, :]`.

    Raises:
        ValueError: indices or dim is not so.
    """

    indices: Tensor
    dim: Dim

    def __post_init__(self) -> None:
        if self.dim not in get_args(Dim):
            raise ValueError(f"dim must be 'input' or 'output', got {self.dim!r}")
        indices = self.indices
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
            got = f"{indices.dtype} {list(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
            raise ValueError(f"indices must be int64 [s], got {got}")
        if indices.device.type != "cpu":
            raise ValueError(f"indices must be on the CPU, got {indices.device}")
        if bool((indices[1:] <= indices[:-1]).any()) or bool((indices[:1] < 0).any()):
            raise ValueError("indices must be sorted, unique and not negative")

    @property
    def contiguous(self) -> bool:
        """Whether the channels are consecutive, so that a kernel can take them without gathering."""
        count = self.indices.numel()
        return count == 0 or int(self.indices[-1] - self.indices[0]) == count - 1
