"""What data-parallel training needs for every process to select the same entries; nothing without torch.distributed."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def several() -> bool:
    """Whether other processes train along."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this is the process whose choice counts."""
    return not several() or dist.get_rank() == 0


def from_first(tensor: Tensor) -> Tensor:
    """The first process's `tensor`, in place."""
    if several():
        dist.broadcast(tensor, 0)
    return tensor


def average(tensor: Tensor) -> Tensor:
    """The mean over all processes, in place: what DistributedDataParallel makes of gradients."""
    if several():
        tensor.div_(dist.get_world_size())
        dist.all_reduce(tensor)
    return tensor
