"""Calls of single operators: arguments, how to run them, and the formulas in einsum, in any dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, einsum

from peft_kernels.reference.lora import accumulation_dtype
from peft_kernels.reference.philox import dropout_mask

from .accuracy import assert_accurate

ACTIVATIONS = {
    "lora_shrink": "x",
    "lora_accumulate_": "out",
    "lora_matmul": "x",
    "lora_factor_grad": "x",
    "lora_grad_b": "grad_out",
    "lora_linear_forward": "x",
    "lora_linear_backward": "grad_out",
}
"""Operator to the argument whose dtype is that of the call."""
OPERATORS = tuple(ACTIVATIONS)
DROPPING = tuple(operator for operator in OPERATORS if operator != "lora_grad_b")
"""The operators that take dropout_p and rng_state."""


@dataclass(frozen=True)
class Call:
    """One call of an operator: its arguments by name, in the order of the schema."""

    operator: str
    arguments: dict[str, Any]

    def run(self, kernel: Callable[..., Any]) -> tuple[Tensor, ...]:
        """The results; those of `lora_accumulate_` in a copy of `out` with the same strides."""
        if self.operator != "lora_accumulate_":
            result = kernel(*self.arguments.values())
            return result if isinstance(result, tuple) else (result,)
        own = self.map(lambda tensor: tensor, out=same_strides(self.arguments["out"]))
        kernel(*own.arguments.values())
        return (own.arguments["out"],)

    def map(self, function: Callable[[Tensor], Tensor], **changes: Any) -> Call:
        """The call with `function` applied to every floating point tensor, then `changes` made."""
        mapped = {
            name: function(value) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self.arguments.items()
        }
        return replace(self, arguments={**mapped, **changes})


def same_strides(tensor: Tensor) -> Tensor:
    """A copy that overlaps nothing and keeps the strides, gaps included."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.empty(max(extent, 0), dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def random_call(
    operator: str,
    *,
    rows: int = 7,
    columns: int = 24,
    out_columns: int = 20,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    factor_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    bias: bool = True,
    transposed: bool = False,
    needs: tuple[bool, bool, bool] = (True, True, True),
    integers: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Call:
    """A call on random normal numbers, or on small integers, of which every sum is exact in float32.

    `rows` is M, `columns` the features that are read (or, for `lora_accumulate_`, written), `out_columns` those that
    `lora_matmul` writes and the N of `lora_grad_b` and the layer. `needs`: of x, lora_a and lora_b, for the backward.
    """
    generator = torch.Generator().manual_seed(seed)
    factors, sums = factor_dtype or dtype, accumulation_dtype(dtype)

    def values(*shape: int, to: torch.dtype) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).to(to).to(device)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(to).to(device)

    scaling = 0.5 if integers else 1.7
    rng_state = torch.tensor([seed - 5, 2**40 + seed], dtype=torch.int64, device=device) if dropout_p > 0 else None
    dropout = {"scaling": scaling, "dropout_p": dropout_p, "rng_state": rng_state}
    if operator == "lora_shrink":
        arguments = {"x": values(rows, columns, to=dtype), "factor": values(rank, columns, to=factors), **dropout}
    elif operator == "lora_accumulate_":
        arguments = {
            "out": values(rows, columns, to=dtype),
            "hidden": values(rows, rank, to=sums),
            "factor": values(rank, columns, to=factors),
            **dropout,
        }
    elif operator == "lora_matmul":
        arguments = {
            "x": values(rows, columns, to=dtype),
            "matrix": values(columns, out_columns, to=dtype),
            "bias": values(out_columns, to=dtype) if bias else None,
            "hidden": values(rows, rank, to=sums),
            "factor": values(rank, out_columns, to=factors),
            **dropout,
        }
    elif operator == "lora_factor_grad":
        arguments = {
            "x": values(rows, columns, to=dtype),
            "hidden": values(rows, rank, to=sums),
            **dropout,
            "dtype": factors,
            "transposed": transposed,
        }
    elif operator == "lora_grad_b":
        arguments = {
            "grad_out": values(rows, out_columns, to=dtype),
            "hidden": values(rows, rank, to=sums),
            "lora_b": values(out_columns, rank, to=factors),
            "scaling": scaling,
        }
    elif operator == "lora_linear_forward":
        arguments = {
            "x": values(rows, columns, to=dtype),
            "weight": values(out_columns, columns, to=dtype),
            "bias": values(out_columns, to=dtype) if bias else None,
            "lora_a": values(rank, columns, to=factors),
            "lora_b": values(out_columns, rank, to=factors),
            **dropout,
        }
    elif operator == "lora_linear_backward":
        arguments = {
            "grad_out": values(rows, out_columns, to=dtype),
            "x": values(rows, columns, to=dtype),
            "weight": values(out_columns, columns, to=dtype),
            "lora_a": values(rank, columns, to=factors),
            "lora_b": values(out_columns, rank, to=factors),
            "hidden": values(rows, rank, to=sums),
            **dropout,
            **dict(zip(("need_x", "need_a", "need_b"), needs, strict=True)),
        }
    else:
        raise ValueError(f"unknown operator {operator!r}")
    return Call(operator, arguments)


def result_dtypes(call: Call) -> tuple[torch.dtype, ...]:
    """The dtypes the contract promises."""
    arguments = call.arguments
    dtype = arguments[ACTIVATIONS[call.operator]].dtype
    if call.operator == "lora_shrink":
        return (accumulation_dtype(dtype),)
    if call.operator == "lora_factor_grad":
        return (arguments["dtype"],)
    if call.operator == "lora_grad_b":
        return accumulation_dtype(dtype), arguments["lora_b"].dtype
    if call.operator == "lora_linear_forward":
        return dtype, accumulation_dtype(dtype)
    if call.operator == "lora_linear_backward":
        return dtype, arguments["lora_a"].dtype, arguments["lora_b"].dtype
    return (dtype,)


def formula(call: Call, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The results in einsum with every tensor cast to `dtype`: exact in float64, PyTorch's own in the tested dtype."""
    a = call.map(lambda tensor: tensor.to(dtype)).arguments
    scaling = a["scaling"]

    def drop(values: Tensor) -> Tensor:
        if a["dropout_p"] == 0.0:
            return values
        keep = dropout_mask(values.shape[0], values.shape[1], a["dropout_p"], a["rng_state"])
        return values * keep * (1.0 / (1.0 - a["dropout_p"]) if a["dropout_p"] < 1.0 else 0.0)

    if call.operator == "lora_shrink":
        return (scaling * einsum("mc,rc->mr", drop(a["x"]), a["factor"]),)
    if call.operator == "lora_factor_grad":
        subscripts = "mr,mc->cr" if a["transposed"] else "mr,mc->rc"
        return (scaling * einsum(subscripts, a["hidden"], drop(a["x"])),)
    if call.operator == "lora_grad_b":
        return (
            scaling * einsum("mn,nr->mr", a["grad_out"], a["lora_b"]),
            scaling * einsum("mn,mr->nr", a["grad_out"], a["hidden"]),
        )
    if call.operator == "lora_linear_forward":
        hidden = einsum("mk,rk->mr", drop(a["x"]), a["lora_a"])
        y = einsum("mk,nk->mn", a["x"], a["weight"]) + scaling * einsum("mr,nr->mn", hidden, a["lora_b"])
        return (y if a["bias"] is None else y + a["bias"]), hidden
    if call.operator == "lora_linear_backward":
        grad_hidden = scaling * einsum("mn,nr->mr", a["grad_out"], a["lora_b"])
        low_rank = drop(einsum("mr,rk->mk", grad_hidden, a["lora_a"]))
        nothing = torch.empty(0, dtype=dtype, device=grad_hidden.device)
        return (
            einsum("mn,nk->mk", a["grad_out"], a["weight"]) + low_rank if a["need_x"] else nothing,
            einsum("mr,mk->rk", grad_hidden, drop(a["x"])) if a["need_a"] else nothing,
            scaling * einsum("mn,mr->nr", a["grad_out"], a["hidden"]) if a["need_b"] else nothing,
        )
    low_rank = drop(scaling * einsum("mr,rc->mc", a["hidden"], a["factor"]))
    if call.operator == "lora_accumulate_":
        return (a["out"] + low_rank,)
    base = einsum("mk,kn->mn", a["x"], a["matrix"])
    return ((base if a["bias"] is None else base + a["bias"]) + low_rank,)


def check_call(call: Call, kernel: Callable[..., Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Runs the call and holds its results, which are returned, to promised dtypes, shapes and the accuracy rule."""
    results = call.run(kernel)
    exact, own = formula(call, torch.float64), formula(call, dtype)
    for index, (actual, promised) in enumerate(zip(results, result_dtypes(call), strict=True)):
        assert actual.dtype == promised
        assert_accurate(actual, own[index], exact[index], f"{call.operator} result {index}")
    return results
