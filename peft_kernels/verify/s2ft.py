"""Inputs for the operators of the S2FT family: no channel, one, some, all, along either dimension.

Letters as in `peft_kernels/reference/s2ft.py`: M rows, K and N columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..reference.lora import accumulation_dtype
from .case import Case

_SHAPES = ((0, 9, 5), (1, 1, 1), (33, 70, 41), (130, 257, 96))  # M, K, N
_SHARES = (0.0, 0.1, 1.0)


class _Inputs:
    """Random tensors of one shape; the slice `values` in the dtype that sums have."""

    def __init__(self, sizes: tuple[int, int, int], share: float, dim: int, dtype: torch.dtype, seed: int) -> None:
        self.rows, self.columns, self.out_columns = sizes
        self.dtype, self.dim = dtype, dim
        self.generator = torch.Generator().manual_seed(seed)
        channels = self.columns if dim == 1 else self.out_columns
        self.count = max(round(channels * share), int(share > 0))
        self.indices = torch.randperm(channels, generator=self.generator)[: self.count].sort().values

    def normal(self, *shape: int, sums: bool = False) -> Tensor:
        """Normal numbers in the activations' dtype, or in that of their sums."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return values.to(accumulation_dtype(self.dtype) if sums else self.dtype)

    def slice(self) -> Tensor:
        """A slice of weight in the dtype of the sums."""
        shape = (self.count, self.columns) if self.dim == 0 else (self.out_columns, self.count)
        return self.normal(*shape, sums=True)

    def weight(self) -> Tensor:
        """`[N, K]`."""
        return self.normal(self.out_columns, self.columns)


def _gather(i: _Inputs) -> tuple[Any, ...]:
    return i.normal(i.rows, i.columns if i.dim == 1 else i.out_columns), i.indices


def _grad(i: _Inputs) -> tuple[Any, ...]:
    grad_out, dtype = i.normal(i.rows, i.out_columns), accumulation_dtype(i.dtype)
    if i.dim == 1:
        return grad_out, i.normal(i.rows, i.count), None, dtype
    return grad_out, i.normal(i.rows, i.columns), i.indices, dtype


def _write(i: _Inputs) -> tuple[Any, ...]:
    return i.weight(), i.indices, i.slice(), i.dim


def _exchange(i: _Inputs) -> tuple[Any, ...]:
    weight, change = i.weight(), i.slice()
    original = torch.full_like(change, torch.nan, dtype=i.dtype)
    held = weight.index_select(i.dim, i.indices).flip(i.dim)
    channels = weight.shape[i.dim]
    return weight, channels - 1 - i.indices.flip(0), held, i.indices, change, original, i.dim


def _adamw(i: _Inputs) -> tuple[Any, ...]:
    state = (i.slice(), i.slice(), i.slice(), i.slice().square())
    return *state, i.weight(), i.indices, i.dim, 3, 1e-2, 0.9, 0.99, 1e-8, 0.1


def _swiglu(i: _Inputs) -> tuple[Any, ...]:
    columns = i.columns if i.dim == 1 else i.out_columns
    return 3 * i.normal(i.rows, columns), i.normal(i.rows, columns), i.indices


def _swiglu_backward(i: _Inputs) -> tuple[Any, ...]:
    return i.normal(i.rows, i.columns), 3 * i.normal(i.rows, i.columns), i.normal(i.rows, i.columns)


def _plain_swiglu(gate: Tensor, up: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    h = silu(gate) * up
    return h, h[:, indices]


def _plain_swiglu_backward(grad_h: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
    grad_gate, grad_up = torch.autograd.grad(silu(leaves[0]) * leaves[1], leaves, grad_h)
    return grad_gate, grad_up


_ARGUMENTS: dict[str, Callable[[_Inputs], tuple[Any, ...]]] = {
    "gather_columns": _gather,
    "slice_grad": _grad,
    "slice_write_": _write,
    "slice_exchange_": _exchange,
    "slice_adamw_": _adamw,
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu_backward,
}
_MUTATED = {"slice_write_": (0,), "slice_exchange_": (0, 5), "slice_adamw_": (0, 2, 3, 4)}
_PLAIN = {"swiglu": _plain_swiglu, "swiglu_backward": _plain_swiglu_backward}

OPERATORS = tuple(_ARGUMENTS)


def cases(operator: str, dtype: torch.dtype) -> Iterator[Case]:
    """The calls that `operator` is checked on with a weight or activations of `dtype`."""
    for seed, sizes in enumerate(_SHAPES):
        for share in _SHARES:
            for dim in (0, 1):
                inputs = _Inputs(sizes, share, dim, dtype, seed)
                name = "M={} K={} N={}".format(*sizes) + f" {inputs.count} channels, dim {dim}"
                arguments = _ARGUMENTS[operator](inputs)
                yield Case(name, arguments, _MUTATED.get(operator, ()), _PLAIN.get(operator))
