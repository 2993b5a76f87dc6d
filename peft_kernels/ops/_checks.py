"""What the checks of all operators share."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes of activations."""

transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
"""Whether a `torch.func` transform is active: it needs the reference, which it can take apart."""


def dtype_and_shape(tensor: Tensor) -> str:
    """A tensor in a message, as `float32 [3, 4]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def describe(tensor: Tensor) -> str:
    """A tensor in a message, as `float32 [3, 4] on cpu`."""
    return f"{dtype_and_shape(tensor)} on {tensor.device}"


def first_true(wrong: Tensor) -> int | None:
    """The first position where `wrong [n]` is true; a wait on a GPU."""
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else None


def check_sorted(indices: Tensor, size: int, dtypes: tuple[torch.dtype, ...], counted: str) -> None:
    """Raises unless `indices` are 1-D, contiguous, of one of `dtypes`, sorted and unique in `[0, size)`.

    `counted` says in the message what `size` counts. A pass over the indices, and on a GPU a wait for it.

    Raises:
        TypeError: the dtype is another one.
        ValueError: anything else; the message names the first entry that is wrong.
    """
    if indices.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"indices must be {names}, got {dtype_and_shape(indices)}")
    if indices.dim() != 1:
        raise ValueError(f"indices must be 1-D, got {dtype_and_shape(indices)}")
    if not indices.is_contiguous():
        raise ValueError(f"indices must be contiguous, got {dtype_and_shape(indices)} with stride {indices.stride(0)}")
    if indices.numel() > size:
        raise ValueError(f"indices must be at most as many as {counted}, {size}, got {dtype_and_shape(indices)}")
    # An int32 tensor cannot be compared with a number that int32 does not hold; it is below such a number anyway.
    largest = min(size - 1, torch.iinfo(indices.dtype).max)
    at = first_true((indices < 0) | (indices > largest))
    if at is not None:
        raise ValueError(f"indices must be in [0, {size}), got {int(indices[at])} at position {at}")
    at = first_true(indices[1:] <= indices[:-1])
    if at is None:
        return
    before, after = indices[at : at + 2].tolist()
    if before == after:
        raise ValueError(f"indices must be unique, got {after} at positions {at} and {at + 1}")
    raise ValueError(f"indices must be sorted, got {after} at position {at + 1} after {before}")
