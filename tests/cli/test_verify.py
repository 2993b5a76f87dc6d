"""`peft-kernels verify`: passes on right kernels, fails on wrong ones, and says which."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels import backends
from peft_kernels.backends import DTYPES, Registration
from peft_kernels.reference import lora, philox
from peft_kernels.verify import verify
from peft_kernels.verify.check import FAMILIES

from .conftest import Invoke


@contextmanager
def planted(operator: str, function: Callable[..., Any]) -> Iterator[None]:
    """Registers `function` as the `cpu` backend of `operator`, and drops every other operator for speed."""
    before = {name: dict(kernels) for name, kernels in backends._registrations.items()}
    reference = before.get(operator, {}).get("reference", Registration(function, ("cpu",), DTYPES))
    try:
        backends._registrations.clear()
        backends.register(operator, "reference", reference)
        backends.register(operator, "cpu", Registration(function, ("cpu",), DTYPES))
        yield
    finally:
        backends._registrations.clear()
        backends._registrations.update(before)
        backends._table.clear()


def wrong_sign(*arguments: Any) -> Tensor:
    """`lora_shrink` times -1."""
    return -lora.lora_shrink(*arguments)


def bfloat16_sums(x: Tensor, *rest: Any) -> Tensor:
    """`lora_shrink` with a result that was rounded to bfloat16 on its way."""
    result = lora.lora_shrink(x, *rest)
    return result.to(torch.bfloat16).to(result.dtype)


def no_dropout(x: Tensor, factor: Tensor, scaling: float, _p: float, _state: Tensor | None) -> Tensor:
    """`lora_shrink` that forgets to drop."""
    return lora.lora_shrink(x, factor, scaling, 0.0, None)


def wrong_dtype(*arguments: Any) -> Tensor:
    """`lora_shrink` in another dtype than promised."""
    return lora.lora_shrink(*arguments).to(torch.float16)


def stray_nan(*arguments: Any) -> Tensor:
    """`lora_shrink` with one element left unwritten."""
    result = lora.lora_shrink(*arguments).clone()
    if result.numel():
        result.view(-1)[-1] = float("nan")
    return result


def factors_cast_on_load(x: Tensor, factor: Tensor, *rest: Any) -> Tensor:
    """`lora_shrink` as a kernel computes it that multiplies in the dtype of x: allowed, sums being float32."""
    return lora.lora_shrink(x, factor.to(x.dtype), *rest)


def refusing(*_arguments: Any) -> Tensor:
    """A kernel that raises."""
    raise RuntimeError("no such instruction")


def shifted_mask(rows: int, columns: int, dropout_p: float, rng_state: Tensor) -> Tensor:
    """`dropout_mask` of the next offset."""
    return philox.dropout_mask(rows, columns, dropout_p, rng_state + torch.tensor([0, 1]))


def test_every_operator_of_this_machine_passes(invoke: Invoke) -> None:
    result = invoke("verify")
    assert result.exit_code == 0, result.output
    assert all(operator in result.output for operator in backends.operators())
    assert "checks passed" in result.output


def test_every_registered_operator_has_inputs() -> None:
    assert sorted(backends.operators()) == sorted(name for family in FAMILIES for name in family.OPERATORS)


@pytest.mark.parametrize("kernel", [wrong_sign, no_dropout, wrong_dtype, stray_nan, refusing])
def test_a_wrong_kernel_fails_in_every_dtype(kernel: Callable[..., Any]) -> None:
    with planted("lora_shrink", kernel):
        outcomes = list(verify())
    assert {(o.dtype, o.passed) for o in outcomes if o.backend == "cpu"} == {(dtype, False) for dtype in DTYPES}
    assert all(o.passed for o in outcomes if o.backend == "reference")


def test_sums_in_low_precision_fail() -> None:
    with planted("lora_shrink", bfloat16_sums):
        outcomes = list(verify())
    assert not any(outcome.passed for outcome in outcomes if outcome.backend == "cpu")


def test_casting_factors_on_load_passes() -> None:
    with planted("lora_shrink", factors_cast_on_load):
        assert all(outcome.passed for outcome in verify())


def test_one_wrong_bit_of_a_mask_fails() -> None:
    with planted("dropout_mask", shifted_mask):
        outcomes = list(verify())
    assert not any(outcome.passed for outcome in outcomes if outcome.backend == "cpu")


def test_command_names_the_wrong_kernel_and_exits_with_1(invoke: Invoke) -> None:
    with planted("lora_shrink", wrong_sign):
        result = invoke("verify")
    assert result.exit_code == 1
    assert "FAILED lora_shrink, cpu on cpu, float32: M=1 K=1 N=1 r=1 p=0" in result.output
    assert "4 of 8 checks failed" in result.output


def test_an_operator_without_inputs_fails(invoke: Invoke) -> None:
    with planted("brand_new_operator", wrong_sign):
        result = invoke("verify")
    assert result.exit_code == 1
    assert "no family supplies inputs for it" in result.output
