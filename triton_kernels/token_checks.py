"""What the launchers of token elimination ask of their arguments: `checks.py` for the operators of
`token_elimination.py` and `token_selection.py`, with the messages of `csrc/common/token_checks.h`.

What the rows are is not looked at here: nobody could without waiting for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import _activations, _bias, _described, _dtype_of, _exactly, _floating, _matrix, _overlaps_itself, _refuse


def _on(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        _refuse(op, f"{name} must be on {device} like the other arguments, got {_described(tensor)}")


def _rows(op: str, rows: Tensor, device: torch.device) -> int:
    """How many entries a list of rows has."""
    if rows.dtype != torch.int32:
        _refuse(op, f"rows must be int32, got {_described(rows)}")
    if rows.dim() != 1:
        _refuse(op, f"rows must be 1-D, got {_described(rows)}")
    _on(op, "rows", rows, device)
    return rows.shape[0]


def _row_values(op: str, name: str, target: Tensor, values: Tensor, rows: Tensor) -> None:
    _, columns = _activations(op, name, target)
    count = _rows(op, rows, target.device)
    _exactly(op, "values", values, count, columns, target.device)
    _dtype_of(op, "values", values, name, target.dtype)


def _extents_meet(left: Tensor, right: Tensor) -> bool:
    """Whether what lies between first and last byte of two matrices has bytes in common."""
    if left.numel() == 0 or right.numel() == 0:
        return False
    (begin, end), (other_begin, other_end) = _extent(left), _extent(right)
    return begin < other_end and other_begin < end


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def gather_rows(x: Tensor, rows: Tensor) -> None:
    op = "gather_rows"
    _activations(op, "x", x)
    _rows(op, rows, x.device)


def scatter_add_rows(residual: Tensor, values: Tensor, rows: Tensor) -> None:
    _row_values("scatter_add_rows", "residual", residual, values, rows)


def scatter_add_rows_(out: Tensor, values: Tensor, rows: Tensor) -> None:
    op = "scatter_add_rows_"
    _row_values(op, "out", out, values, rows)
    if _overlaps_itself(out):
        _refuse(op, f"out is written in place and must not overlap itself, got strides {out.stride()}")
    if _extents_meet(values, out):
        expected = "values must share no memory with out, which is written in place"
        _refuse(op, f"{expected}, got {_described(values)} for {_described(out)}")


def gather_linear_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    residual: Tensor | None,
    gather: bool,
    transposed: bool,
) -> None:
    op, device = "gather_linear_scatter", x.device
    height, inner = _activations(op, "x", x)
    count = _rows(op, rows, device)
    if not gather and height != count:
        _refuse(op, f"x must be [{count}, K], gathered as rows are, got {_described(x)}")
    shape = _matrix(op, "weight", weight, device)
    if shape[0 if transposed else 1] != inner:
        expected = f"[{inner}, N]" if transposed else f"[N, {inner}]"
        _refuse(op, f"weight must be {expected}, got {_described(weight)}")
    _dtype_of(op, "weight", weight, "x", x.dtype)
    columns = shape[1 if transposed else 0]
    _bias(op, bias, columns, x)
    if residual is None:
        return
    total, width = _matrix(op, "residual", residual, device)
    if width != columns or (gather and total != height):
        _refuse(op, f"residual must be [{height if gather else 'M'}, {columns}], got {_described(residual)}")
    _dtype_of(op, "residual", residual, "x", x.dtype)


def block_scores(q: Tensor, k: Tensor, block_size: int, starts: Tensor | None) -> None:
    op = "block_scores"
    if q.dim() != 4:
        _refuse(op, f"q must be [B, heads, T, D], got {_described(q)}")
    _floating(op, "q", q)
    batch, heads, tokens, width = q.shape
    key_heads = k.shape[1] if k.dim() == 4 else 0
    if k.dim() != 4 or k.shape != (batch, key_heads, tokens, width) or key_heads == 0 or heads % key_heads:
        expected = f"[{batch}, key_value_heads, {tokens}, {width}] with key_value_heads a divisor of {heads}"
        _refuse(op, f"k must be {expected}, got {_described(k)}")
    _dtype_of(op, "k", k, "q", q.dtype)
    _on(op, "k", k, q.device)
    if block_size < 1:
        _refuse(op, f"block_size must be at least 1, got {block_size}")
    if starts is None:
        return
    if starts.dtype != torch.int32:
        _refuse(op, f"starts must be int32, got {_described(starts)}")
    if starts.shape != (batch, tokens):
        _refuse(op, f"starts must be [{batch}, {tokens}], got {_described(starts)}")
    _on(op, "starts", starts, q.device)


CHECKS: dict[str, Callable[..., Any]] = {
    check.__name__: check
    for check in (gather_rows, scatter_add_rows, scatter_add_rows_, gather_linear_scatter, block_scores)
}
"""Operator name to its check, which returns nothing or raises RuntimeError."""
