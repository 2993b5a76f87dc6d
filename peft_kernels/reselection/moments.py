"""The optimizer's state of a delta whose entries move: it follows those that stay, in index order.

Adam divides its moments by `1 - beta^t` to make up for their start at zero, t being the steps it has made. The method
gives each grown entry moments as if it had trained for `age` steps with the gradients that were seen of it,

    m = mean(g) (1 - beta1^age),    v = mean(g^2) (1 - beta2^age),

which that division turns back into mean(g) and mean(g^2) if, and only if, age is the t that it divides by. Ansell et
al. keep an age for each entry and divide by it. torch's optimizers and ours count the steps of a parameter as a whole,
so here age is that count: right behind a reselection, and in every later step, the moments are unbiased. (At the first
reselection the two are the same.) Entries grown without gradients to go by start at zero, as those of a dense parameter
do that has had no gradient there so far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .growth import Growth

_PER_WEIGHT = ("row_max", "column_max")
"""SM3's maxima belong to rows and columns, wherever the entries are."""


def state_per_entry(state: dict[str, Any], values: Tensor) -> dict[str, Tensor]:
    """The tensors in an optimizer's state that hold one number for each of `values`.

    Raises:
        TypeError: such a tensor is not floating point (a quantised state, which cannot be moved entry by entry).
    """
    found = {}
    for name, tensor in state.items():
        if name in _PER_WEIGHT or not isinstance(tensor, Tensor) or tensor.shape != values.shape:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"optimizer: its state {name} must be floating point to move along, got {tensor.dtype}")
        found[name] = tensor
    return found


def seeds(state: dict[str, Any], group: dict[str, Any], growth: Growth) -> dict[str, Tensor]:
    """What the grown entries start with by name of the state; what is missing starts at zero."""
    if growth.mean is None or growth.mean_square is None or not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
        return {}
    age = int(state["step"])
    beta1, beta2 = group["betas"]
    mean = -growth.mean if group.get("maximize") else growth.mean
    return {"exp_avg": mean * (1 - beta1**age), "exp_avg_sq": growth.mean_square * (1 - beta2**age)}


def move(state: dict[str, Tensor], kept: Tensor, source: Tensor, seeds: dict[str, Tensor]) -> None:
    """Moves state along, in place.

    Args:
        state: tensors `[nnz]`, as `state_per_entry` finds them.
        kept: bool `[nnz]`, the entries that stay.
        source: `[nnz]`: where in cat(kept ones, grown ones) each entry comes from.
        seeds: `[grown]` per name, what grown entries start with; zero otherwise.
    """
    for name, tensor in state.items():
        staying = tensor[kept]
        grown = tensor.new_zeros(tensor.numel() - staying.numel())
        if name in seeds:
            grown.copy_(seeds[name])
        tensor.copy_(torch.cat((staying, grown))[source])
