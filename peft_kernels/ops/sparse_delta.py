"""The operators of the sparse-delta family and their backends; formulas in `peft_kernels/reference/sparse_delta.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import sparse_delta as reference
from ._register import register_operator


def check_indices(indices: Tensor, numel: int) -> None:
    """Raises unless `indices` are positions in a weight of `numel` elements: sorted, unique and in range.

    The operators trust in this, so it is checked once, where indices are installed; a pass over them, and on a GPU a
    wait for it.

    Args:
        indices: `[nnz]`, int32 or int64, contiguous.
        numel: how many elements the weight has.

    Raises:
        TypeError: the dtype is another one.
        ValueError: anything else; the message names the first entry that is wrong.
    """
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices must be int32 or int64, got {_described(indices)}")
    if indices.dim() != 1:
        raise ValueError(f"indices must be 1-D, got {_described(indices)}")
    if not indices.is_contiguous():
        raise ValueError(f"indices must be contiguous, got {_described(indices)} with stride {indices.stride(0)}")
    if indices.numel() > numel:
        raise ValueError(
            f"indices must be at most as many as the weight has elements, {numel}, got {_described(indices)}"
        )
    at = _first((indices < 0) | (indices >= numel))
    if at is not None:
        raise ValueError(f"indices must be in [0, {numel}), got {int(indices[at])} at position {at}")
    at = _first(indices[1:] <= indices[:-1])
    if at is None:
        return
    before, after = indices[at : at + 2].tolist()
    if before == after:
        raise ValueError(f"indices must be unique, got {after} at positions {at} and {at + 1}")
    raise ValueError(f"indices must be sorted, got {after} at position {at + 1} after {before}")


def _first(wrong: Tensor) -> int | None:
    """The first position where `wrong` is true."""
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else None


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _fake_in_place(*_: Any) -> None:
    pass


def _fake_sampled_product(grad_out: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(indices.shape[0], dtype=dtype)


def _register() -> None:
    for name, definition, fake in (
        ("scatter_write_", reference.scatter_write_, _fake_in_place),
        ("scatter_accumulate_", reference.scatter_accumulate_, _fake_in_place),
        ("sampled_product", reference.sampled_product, _fake_sampled_product),
        ("sparse_adamw_", reference.sparse_adamw_, _fake_in_place),
    ):
        register_operator(name, reference=definition, fake=fake, cuda=False, triton="no Triton kernel yet")


_register()
