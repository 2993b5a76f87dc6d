"""The same values in other strides: what a caller's view may look like."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "every_other", "offset", "padded")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A tensor equal to `tensor` in shape and values, with the strides that `layout` names.

    - `contiguous`: rows after one another.
    - `transposed`: the last two dimensions swapped in memory (for a vector: as `every_other`).
    - `every_other`: every second element of the last dimension of a larger tensor, so no two are neighbors.
    - `offset`: a window into a larger tensor that starts at its element (1, ..., 1): rows further apart than they are
      long, and an address that is not a multiple of a vector register.
    - `padded`: rows that start at multiples of 64 bytes and end anywhere, so that a full vector fits at every start.
    """
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout in ("transposed", "every_other"):
        larger = _surroundings(tensor, [*tensor.shape[:-1], 2 * tensor.shape[-1]])
        view = larger[..., ::2]
    elif layout == "padded":
        larger = _surroundings(tensor, [*tensor.shape[:-1], (tensor.shape[-1] // 32 + 2) * 32])
        view = larger[..., : tensor.shape[-1]]
    elif layout == "offset":
        larger = _surroundings(tensor, [size + 2 for size in tensor.shape])
        view = larger[tuple(slice(1, 1 + size) for size in tensor.shape)]
    else:
        raise ValueError(f"unknown layout {layout!r}")
    view.copy_(tensor)
    return view


def _surroundings(tensor: Tensor, shape: list[int]) -> Tensor:
    # A kernel that uses what lies around the view shows: NaN, or in half precision a large number, because oneDNN's
    # matrix product (AMX, odd row length) multiplies the element after a row by zero.
    fill = float("nan") if tensor.dtype in (torch.float32, torch.float64) else 1e4 if tensor.is_floating_point() else 1
    return torch.full(shape, fill, dtype=tensor.dtype, device=tensor.device)
