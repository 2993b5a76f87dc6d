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


def gather_rows(x: Tensor, rows: Tensor) -> None:
    op = "gather_rows"
    _activations(op, "x", x)
    _rows(op, rows, x.device)


def scatter_add_rows(residual: Tensor, values: Tensor, rows: Tensor) -> None:
    _row_values("scatter_add_rows", "residual", residual, values, rows)


def scatter_add_rows_(out: Tensor, values: Tensor, rows: Tensor) -> None:
    op = "scatter_add_rows_"
    _row_values(op, "out", out, values, rows)
    _own_memory(op, out, {"values": values})


def _product(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, gather: bool, transposed: bool
) -> tuple[int, int]:
    """Rows of x and columns of the product."""
    device = x.device
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
    return height, columns


def _target(op: str, name: str, target: Tensor, x: Tensor, shape: tuple[int, int], gather: bool) -> None:
    """What a product is added to: `[M, N]`, with as many rows as x where these are gathered."""
    height, columns = shape
    total, width = _matrix(op, name, target, x.device)
    if width != columns or (gather and total != height):
        _refuse(op, f"{name} must be [{height if gather else 'M'}, {columns}], got {_described(target)}")
    _dtype_of(op, name, target, "x", x.dtype)


def gather_linear_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    residual: Tensor | None,
    gather: bool,
    transposed: bool,
) -> None:
    op = "gather_linear_scatter"
    shape = _product(op, x, weight, bias, rows, gather, transposed)
    if residual is not None:
        _target(op, "residual", residual, x, shape, gather)


def gather_linear_scatter_(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, gather: bool, transposed: bool
) -> None:
    op = "gather_linear_scatter_"
    _target(op, "out", out, x, _product(op, x, weight, bias, rows, gather, transposed), gather)
    _own_memory(op, out, {"x": x, "weight": weight, "bias": bias})


def _own_memory(op: str, out: Tensor, others: dict[str, Tensor | None]) -> None:
    if _overlaps_itself(out):
        _refuse(op, f"out is written in place and must not overlap itself, got strides {out.stride()}")
    for name, tensor in others.items():
        if tensor is not None and _interleaved(out, tensor):
            _refuse(op, f"out is written in place and must lie apart from {name} in memory, got one within the other")


def _interleaved(first: Tensor, second: Tensor) -> bool:
    """Whether memory between the first and the last element of one tensor is between those of the other, too."""
    (begin, end), (other_begin, other_end) = _extent(first), _extent(second)
    return begin < other_end and other_begin < end


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first element to behind its last."""
    if tensor.numel() == 0:
        return 0, 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.element_size()


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
    for check in (
        gather_rows,
        scatter_add_rows,
        scatter_add_rows_,
        gather_linear_scatter,
        gather_linear_scatter_,
        block_scores,
    )
}
"""Operator name to its check, which returns nothing or raises RuntimeError."""
