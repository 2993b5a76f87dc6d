"""What the launchers of slices of channels ask of their arguments: `checks.py` for the operators of `s2ft.py`, with the
messages of `csrc/common/slice_checks.h`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import _FLOATING, _FLOATING_NAMES, _activations, _described, _matrix, _name, _refuse


def _channels(op: str, indices: Tensor, channels: int, device: torch.device) -> None:
    """Refuses what cannot be some of `channels` channels; that they are sorted, unique and in range is trusted."""
    if indices.dtype != torch.int64:
        _refuse(op, f"indices must be int64, got {_described(indices)}")
    if indices.dim() != 1:
        _refuse(op, f"indices must be 1-D, got {_described(indices)}")
    if indices.device != device:
        _refuse(op, f"indices must be on {device} like the other arguments, got {_described(indices)}")
    if not indices.is_contiguous():
        _refuse(op, f"indices must be contiguous, got {_described(indices)} with strides {list(indices.stride())}")
    if indices.shape[0] > channels:
        count = f"at most as many as there are channels, {channels}"
        _refuse(op, f"indices must be {count}, got {_described(indices)}")


def gather_columns(x: Tensor, indices: Tensor) -> None:
    op = "gather_columns"
    _, columns = _activations(op, "x", x)
    _channels(op, indices, columns, x.device)


def slice_grad(grad_out: Tensor, x: Tensor, indices: Tensor | None, dtype: torch.dtype) -> None:
    op = "slice_grad"
    rows, channels = _activations(op, "grad_out", grad_out)
    height, _ = _matrix(op, "x", x, grad_out.device)
    if x.dtype != grad_out.dtype:
        _refuse(op, f"x must have the activations' dtype, {_name(grad_out.dtype)}, got {_described(x)}")
    if height != rows:
        _refuse(op, f"x must be [{rows}, B], got {_described(x)}")
    if indices is not None:
        _channels(op, indices, channels, grad_out.device)
    if dtype not in _FLOATING:
        _refuse(op, f"dtype must be {_FLOATING_NAMES}, got {_name(dtype)}")


CHECKS: dict[str, Callable[..., Any]] = {check.__name__: check for check in (gather_columns, slice_grad)}
"""Operator name to its check, which returns nothing or raises RuntimeError."""
