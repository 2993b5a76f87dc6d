"""What the launchers ask of their arguments, before anything runs: a kernel that reads out of range would take the
whole CUDA context of the process with it.

One function per operator of `csrc/library.cpp`, with the operator's arguments. A good call costs a few comparisons;
messages are made on failure only. They are those of `csrc/cpu/lora_checks.h`, raised as the RuntimeError that the
compiled operators raise, so that a wrong call fails alike on every backend; but for float64, which is not served here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

_FLOATING = (torch.float32, torch.bfloat16, torch.float16)
_FLOATING_NAMES = "float32, bfloat16 or float16"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}"


def _refuse(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"{op}: {message}")


def _matrix(op: str, name: str, tensor: Tensor, device: torch.device) -> torch.Size:
    """The shape of an argument that must be a matrix on the device of the others."""
    if tensor.dim() != 2:
        _refuse(op, f"{name} must be 2-D, got {_described(tensor)}")
    if tensor.device != device:
        _refuse(op, f"{name} must be on {device} like the other arguments, got {_described(tensor)}")
    return tensor.shape


def _floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATING:
        _refuse(op, f"{name} must be {_FLOATING_NAMES}, got {_described(tensor)}")


def _activations(op: str, name: str, tensor: Tensor) -> torch.Size:
    """The shape of the argument that sets dtype and device."""
    shape = _matrix(op, name, tensor, tensor.device)
    _floating(op, name, tensor)
    return shape


def _dtype_of(op: str, name: str, tensor: Tensor, activations: str, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        _refuse(op, f"{name} must have {activations}'s dtype, {_name(dtype)}, got {_described(tensor)}")


def _exactly(op: str, name: str, tensor: Tensor, rows: int, columns: int, device: torch.device) -> None:
    if _matrix(op, name, tensor, device) != (rows, columns):
        _refuse(op, f"{name} must be [{rows}, {columns}], got {list(tensor.shape)}")


def _bias(op: str, bias: Tensor | None, columns: int, x: Tensor) -> None:
    if bias is not None and (bias.shape != (columns,) or bias.dtype != x.dtype or bias.device != x.device):
        expected = f"[{columns}] in x's dtype, {_name(x.dtype)}, on {x.device}"
        _refuse(op, f"bias must be {expected}, got {_described(bias)}")


def _factor(op: str, name: str, factor: Tensor, columns: int, device: torch.device) -> int:
    """The rank of a factor `[rank, columns]`."""
    rank, width = _matrix(op, name, factor, device)
    if width != columns or rank < 1:
        _refuse(op, f"{name} must be [rank >= 1, {columns}], got {list(factor.shape)}")
    _floating(op, name, factor)
    return rank


def _hidden(op: str, hidden: Tensor, rows: int, device: torch.device) -> int:
    """The rank of `hidden [rows, rank]`."""
    height, rank = _matrix(op, "hidden", hidden, device)
    if height != rows or rank < 1:
        _refuse(op, f"hidden must be [{rows}, rank >= 1], got {list(hidden.shape)}")
    if hidden.dtype != torch.float32:
        _refuse(op, f"hidden must be float32 for these activations, got {_described(hidden)}")
    return rank


def _same_rank(op: str, hidden_rank: int, factor_rank: int, factor: Tensor) -> None:
    if hidden_rank != factor_rank:
        _refuse(op, f"factor must have hidden's rank {hidden_rank}, got {list(factor.shape)}")


def _probability(op: str, dropout_p: float) -> None:
    if not 0.0 <= dropout_p <= 1.0:  # also refuses NaN
        _refuse(op, f"dropout_p must be a probability in [0, 1], got {dropout_p}")


def _rng_state(op: str, rng_state: Tensor, device: torch.device) -> None:
    if rng_state.dtype != torch.int64 or rng_state.shape != (2,) or rng_state.device != device:
        _refuse(op, f"rng_state must be int64 [2] (seed, offset) on {device}, got {_described(rng_state)}")


def _dropout(op: str, dropout_p: float, rng_state: Tensor | None, device: torch.device) -> None:
    _probability(op, dropout_p)
    if dropout_p == 0.0:
        return
    if rng_state is None:
        _refuse(op, "rng_state is needed when dropout_p > 0, got None")
    _rng_state(op, rng_state, device)


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a matrix share memory: by the order of its strides, exact for all that views produce."""
    (rows, columns), (row, column) = tensor.shape, tensor.stride()
    if rows <= 1 or columns <= 1:
        return (rows > 1 and row == 0) or (columns > 1 and column == 0)
    if row >= column:
        return column < 1 or row <= (columns - 1) * column
    return row < 1 or column <= (rows - 1) * row


def dropout_mask(rows: int, columns: int, dropout_p: float, rng_state: Tensor) -> None:
    op = "dropout_mask"
    if rows < 0 or columns < 0:
        _refuse(op, f"rows and columns must not be negative, got {rows}, {columns}")
    _probability(op, dropout_p)
    _rng_state(op, rng_state, rng_state.device)  # the kernel reads it for any probability


def lora_shrink(x: Tensor, factor: Tensor, scaling: float, dropout_p: float, rng_state: Tensor | None) -> None:
    op = "lora_shrink"
    _, columns = _activations(op, "x", x)
    _factor(op, "factor", factor, columns, x.device)
    _dropout(op, dropout_p, rng_state, x.device)


def lora_accumulate_(
    out: Tensor, hidden: Tensor, factor: Tensor, scaling: float, dropout_p: float, rng_state: Tensor | None
) -> None:
    op, device = "lora_accumulate_", out.device
    rows, columns = _activations(op, "out", out)
    if _overlaps_itself(out):
        _refuse(op, f"out is written in place and must not overlap itself, got strides {out.stride()}")
    factor_rank = _factor(op, "factor", factor, columns, device)
    _same_rank(op, _hidden(op, hidden, rows, device), factor_rank, factor)
    _dropout(op, dropout_p, rng_state, device)


def lora_matmul(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    factor: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> None:
    op, device = "lora_matmul", x.device
    rows, inner = _activations(op, "x", x)
    height, columns = _matrix(op, "matrix", matrix, device)
    if height != inner:
        _refuse(op, f"matrix must be [{inner}, C_out], got {list(matrix.shape)}")
    _dtype_of(op, "matrix", matrix, "x", x.dtype)
    _bias(op, bias, columns, x)
    factor_rank = _factor(op, "factor", factor, columns, device)
    _same_rank(op, _hidden(op, hidden, rows, device), factor_rank, factor)
    _dropout(op, dropout_p, rng_state, device)


def lora_factor_grad(
    x: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
    dtype: torch.dtype,
    transposed: bool,
) -> None:
    op = "lora_factor_grad"
    rows, _ = _activations(op, "x", x)
    _hidden(op, hidden, rows, x.device)
    if dtype not in _FLOATING:
        _refuse(op, f"dtype must be {_FLOATING_NAMES}, got {_name(dtype)}")
    _dropout(op, dropout_p, rng_state, x.device)


def lora_grad_b(grad_out: Tensor, hidden: Tensor, lora_b: Tensor, scaling: float) -> None:
    op, device = "lora_grad_b", grad_out.device
    rows, columns = _activations(op, "grad_out", grad_out)
    rank = _hidden(op, hidden, rows, device)
    _exactly(op, "lora_b", lora_b, columns, rank, device)
    _floating(op, "lora_b", lora_b)


def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> None:
    op, device = "lora_linear_forward", x.device
    _, in_features = _activations(op, "x", x)
    out_features, width = _matrix(op, "weight", weight, device)
    if width != in_features:
        _refuse(op, f"weight must be [N, {in_features}], got {list(weight.shape)}")
    _dtype_of(op, "weight", weight, "x", x.dtype)
    _bias(op, bias, out_features, x)
    rank = _factor(op, "lora_a", lora_a, in_features, device)
    _exactly(op, "lora_b", lora_b, out_features, rank, device)
    _floating(op, "lora_b", lora_b)
    _dropout(op, dropout_p, rng_state, device)


def lora_linear_backward(
    grad_out: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> None:
    op, device = "lora_linear_backward", grad_out.device
    rows, out_features = _activations(op, "grad_out", grad_out)
    height, in_features = _matrix(op, "weight", weight, device)
    if height != out_features:
        _refuse(op, f"weight must be [{out_features}, K], got {list(weight.shape)}")
    _dtype_of(op, "weight", weight, "grad_out", grad_out.dtype)
    if x is not None:
        _exactly(op, "x", x, rows, in_features, device)
        _dtype_of(op, "x", x, "grad_out", grad_out.dtype)
    elif need_a:
        _refuse(op, "x must be given for the gradient of lora_a, got None")
    rank = _factor(op, "lora_a", lora_a, in_features, device)
    _exactly(op, "lora_b", lora_b, out_features, rank, device)
    _floating(op, "lora_b", lora_b)
    if _hidden(op, hidden, rows, device) != rank:
        _refuse(op, f"hidden must have lora_a's rank {rank}, got {list(hidden.shape)}")
    _dropout(op, dropout_p, rng_state, device)


def sampled_product(grad_out: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> None:
    op = "sampled_product"
    rows, out_features = _activations(op, "grad_out", grad_out)
    height, in_features = _matrix(op, "x", x, grad_out.device)
    _dtype_of(op, "x", x, "grad_out", grad_out.dtype)
    if height != rows:
        _refuse(op, f"x must be [{rows}, K], got {_described(x)}")
    if indices.dim() != 1:
        _refuse(op, f"indices must be 1-D, got {_described(indices)}")
    if indices.dtype not in (torch.int32, torch.int64):
        _refuse(op, f"indices must be int32 or int64, got {_described(indices)}")
    if indices.device != grad_out.device:
        _refuse(op, f"indices must be on {grad_out.device} like the other arguments, got {_described(indices)}")
    if not indices.is_contiguous():
        _refuse(op, f"indices must be contiguous, got {_described(indices)} with stride {indices.stride(0)}")
    if indices.shape[0] > out_features * in_features:
        entries = out_features * in_features
        _refuse(op, f"indices must be at most N K = {entries} positions, got {_described(indices)}")
    if dtype not in _FLOATING:
        _refuse(op, f"dtype must be {_FLOATING_NAMES}, got {_name(dtype)}")


CHECKS: dict[str, Callable[..., Any]] = {
    check.__name__: check
    for check in (
        dropout_mask, lora_shrink, lora_accumulate_, lora_matmul, lora_factor_grad, lora_grad_b, lora_linear_forward,
        lora_linear_backward, sampled_product,
    )
}  # fmt: skip
"""Operator name to its check, which returns nothing or raises RuntimeError."""


def checked(launcher: Callable[..., Any], checks: dict[str, Callable[..., Any]] = CHECKS) -> Callable[..., Any]:
    """`launcher` behind the check of its name."""
    check = checks[launcher.__name__]

    @functools.wraps(launcher)
    def call(*arguments: Any) -> Any:
        check(*arguments)
        return launcher(*arguments)

    return call
