"""What the accelerated layers of every PEFT method ask of a module, an input and an installed PEFT."""

from __future__ import annotations

import torch
from torch import Tensor


class PeftIncompatible(RuntimeError):
    """The installed PEFT is not built the way `accelerate` relies on; the message names what differs."""


def input_obstacle(x: Tensor, weight: Tensor, *factors: Tensor) -> str | None:
    """Why the operators would not take `x`; PEFT's forward then does, or raises what it has always raised."""
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return "its input is not of the weight's dtype"
    for factor in factors:
        if (factor.dtype == torch.float64) != (x.dtype == torch.float64):
            return "float64 is mixed with another dtype"
    return None
