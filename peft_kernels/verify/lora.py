"""Inputs for the operators of the LoRA family: odd shapes and ranks, dropout, mixed precision, strides.

Letters as in `peft_kernels/reference/lora.py`: M rows, K and N columns, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reference import lora as reference
from ..reference.lora import accumulation_dtype
from .case import Case

_SHAPES = ((1, 1, 1, 1), (0, 16, 8, 2), (7, 33, 65, 3), (65, 130, 257, 17), (128, 64, 96, 64))  # M, K, N, r
_DROPOUTS = (0.0, 0.05, 0.5)
_SCALING = 1.7


@dataclass(frozen=True)
class _Inputs:
    """Random tensors of one shape: normal numbers scaled so that every sum is of order one."""

    rows: int
    columns: int
    out_columns: int
    rank: int
    dtype: torch.dtype
    factor_dtype: torch.dtype
    dropout_p: float
    generator: torch.Generator

    def normal(self, *shape: int, fan_in: int = 1, dtype: torch.dtype | None = None, strided: bool = False) -> Tensor:
        """Normal numbers; `strided` in memory as the transpose."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) / fan_in**0.5
        values = values.to(dtype or self.dtype)
        return values.t().contiguous().t() if strided else values

    def sums(self, *shape: int) -> Tensor:
        """Like `normal`, in the accumulation dtype."""
        return self.normal(*shape, dtype=accumulation_dtype(self.dtype))

    @property
    def dropout(self) -> tuple[float, Tensor | None]:
        """`dropout_p` and `rng_state`, the last two arguments of most operators."""
        return self.dropout_p, torch.tensor([-3, 2**40 + 5]) if self.dropout_p > 0.0 else None


def _dropout_mask(i: _Inputs) -> tuple[object, ...]:
    return i.rows, i.columns, i.dropout_p, torch.tensor([-3, 2**40 + 5])


def _shrink(i: _Inputs) -> tuple[object, ...]:
    x = i.normal(i.rows, i.columns, strided=i.rank == 3)
    factor = i.normal(i.rank, i.columns, fan_in=i.columns, dtype=i.factor_dtype, strided=i.rank == 17)
    return x, factor, _SCALING, *i.dropout


def _accumulate(i: _Inputs) -> tuple[object, ...]:
    factor = i.normal(i.rank, i.columns, fan_in=i.rank, dtype=i.factor_dtype, strided=i.rank == 17)
    return i.normal(i.rows, i.columns), i.sums(i.rows, i.rank), factor, _SCALING, *i.dropout


def _matmul(i: _Inputs) -> tuple[object, ...]:
    x = i.normal(i.rows, i.columns, strided=i.rank == 3)
    # The forward pass hands over weight^T and lora_b^T, the backward pass weight and lora_a.
    matrix = i.normal(i.columns, i.out_columns, fan_in=i.columns, strided=i.rank != 64)
    bias = i.normal(i.out_columns) if i.rank != 2 else None
    factor = i.normal(i.rank, i.out_columns, fan_in=i.rank, dtype=i.factor_dtype, strided=i.rank != 64)
    return x, matrix, bias, i.sums(i.rows, i.rank), factor, _SCALING, *i.dropout


def _factor_grad(i: _Inputs) -> tuple[object, ...]:
    x = i.normal(i.rows, i.columns, strided=i.rank == 3)
    transposed = i.rank in (3, 64)
    return x, i.sums(i.rows, i.rank), _SCALING, *i.dropout, i.factor_dtype, transposed


def _grad_b(i: _Inputs) -> tuple[object, ...]:
    grad_out = i.normal(i.rows, i.out_columns, strided=i.rank == 3)
    lora_b = i.normal(i.out_columns, i.rank, fan_in=i.out_columns, dtype=i.factor_dtype)
    return grad_out, i.sums(i.rows, i.rank), lora_b, _SCALING


def _linear_forward(i: _Inputs) -> tuple[object, ...]:
    x = i.normal(i.rows, i.columns, strided=i.rank == 3)
    weight = i.normal(i.out_columns, i.columns, fan_in=i.columns, strided=i.rank == 17)
    bias = i.normal(i.out_columns) if i.rank != 2 else None
    return x, weight, bias, *_factors(i), _SCALING, *i.dropout


def _linear_backward(i: _Inputs) -> tuple[object, ...]:
    grad_out = i.normal(i.rows, i.out_columns, strided=i.rank == 3)
    need_x, need_a, need_b = i.rank != 3, i.rank != 64, i.rank != 17
    x = i.normal(i.rows, i.columns, strided=i.rank == 3) if need_a else None
    weight = i.normal(i.out_columns, i.columns, fan_in=i.out_columns, strided=i.rank == 17)
    hidden = i.sums(i.rows, i.rank)
    return grad_out, x, weight, *_factors(i), hidden, _SCALING, *i.dropout, need_x, need_a, need_b


def _factors(i: _Inputs) -> tuple[Tensor, Tensor]:
    lora_a = i.normal(i.rank, i.columns, fan_in=i.columns, dtype=i.factor_dtype, strided=i.rank == 17)
    return lora_a, i.normal(i.out_columns, i.rank, fan_in=i.rank, dtype=i.factor_dtype)


_ARGUMENTS: dict[str, Callable[[_Inputs], tuple[object, ...]]] = {
    "dropout_mask": _dropout_mask,
    "lora_shrink": _shrink,
    "lora_accumulate_": _accumulate,
    "lora_matmul": _matmul,
    "lora_factor_grad": _factor_grad,
    "lora_grad_b": _grad_b,
    "lora_linear_forward": _linear_forward,
    "lora_linear_backward": _linear_backward,
}


# Two products in a row: plain PyTorch holds the matrix between them in the activations' dtype, and so may a kernel.
def _plain_forward(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, *rest: Any) -> Any:
    scaling, *dropout = rest
    hidden = _rounded(reference.lora_shrink(x, lora_a, 1.0, *dropout), x.dtype)
    return reference.lora_matmul(x, weight.t(), bias, hidden, lora_b.t(), scaling, 0.0, None), hidden


def _plain_backward(
    grad_out: Tensor, x: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, hidden: Tensor, *rest: Any
) -> Any:
    scaling, dropout_p, rng_state, need_x, need_a, need_b = rest
    dx, grad_a, grad_b = grad_out.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    grad_hidden = _rounded(reference.lora_shrink(grad_out, lora_b.t(), scaling, 0.0, None), grad_out.dtype)
    if need_x:
        dx = reference.lora_matmul(grad_out, weight, None, grad_hidden, lora_a, 1.0, dropout_p, rng_state)
    if x is not None and need_a:
        grad_a = reference.lora_factor_grad(x, grad_hidden, 1.0, dropout_p, rng_state, lora_a.dtype, False)
    if need_b:
        grad_b = reference.lora_factor_grad(grad_out, hidden, scaling, 0.0, None, lora_b.dtype, True)
    return dx, grad_a, grad_b


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).to(tensor.dtype)


_MUTATED = {"lora_accumulate_": (0,)}
_PLAIN: dict[str, Callable[..., Any]] = {
    "lora_linear_forward": _plain_forward,
    "lora_linear_backward": _plain_backward,
}
_WITHOUT_DROPOUT = ("lora_grad_b",)

OPERATORS = tuple(_ARGUMENTS)
"""The operators this module has inputs for."""


def cases(operator: str, dtype: torch.dtype) -> Iterator[Case]:
    """The calls that `operator` is checked on with activations of `dtype`."""
    factor_dtypes = [dtype] if dtype in (torch.float32, torch.float64) else [dtype, torch.float32]
    generator = torch.Generator().manual_seed(0)
    for rows, columns, out_columns, rank in _SHAPES:
        for dropout_p in (0.0,) if operator in _WITHOUT_DROPOUT else _DROPOUTS:
            for factor_dtype in factor_dtypes:
                inputs = _Inputs(rows, columns, out_columns, rank, dtype, factor_dtype, dropout_p, generator)
                factors = str(factor_dtype).removeprefix("torch.")
                name = f"M={rows} K={columns} N={out_columns} r={rank} p={dropout_p:g} factors {factors}"
                yield Case(name, _ARGUMENTS[operator](inputs), _MUTATED.get(operator, ()), _PLAIN.get(operator))
