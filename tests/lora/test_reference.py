"""The reference is the definition; here its formulas meet einsum and automatic differentiation in float64."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.reference import lora as reference
from peft_kernels.reference.philox import dropout_mask

from ..support.accuracy import assert_same_bits
from ..support.lora import formula as layer_formula
from ..support.lora import random_layer
from ..support.operators import OPERATORS, formula, random_call, result_dtypes

DROPOUT = pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
STATE = torch.tensor([11, -4])


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@DROPOUT
def test_operators_are_their_formulas(operator, transposed, bias, dropout_p):
    call = random_call(operator, dtype=torch.float64, dropout_p=dropout_p, transposed=transposed, bias=bias)
    for result, expected in zip(call.run(getattr(reference, operator)), formula(call, torch.float64), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_operators_return_the_promised_dtypes(operator, dtype, factor_dtype):
    factors = torch.float64 if dtype == torch.float64 else factor_dtype
    call = random_call(operator, dtype=dtype, factor_dtype=factors)
    results = call.run(getattr(reference, operator))
    assert tuple(result.dtype for result in results) == result_dtypes(call)
    assert all(result.is_contiguous() for result in results)


@DROPOUT
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)])
def test_layer_is_its_formula(leading, dropout_p):
    layer = random_layer(leading, dtype=torch.float64)
    keep = dropout_mask(layer.x.numel() // 24, 24, dropout_p, STATE) if dropout_p else None
    actual = reference.lora_linear(*layer.tensors().values(), layer.scaling, dropout_p, STATE)
    torch.testing.assert_close(actual, layer_formula(layer, keep, dropout_p), rtol=1e-12, atol=1e-12)


def layer_function(dropout_p, bias):
    def call(*tensors):
        arguments = tensors if bias else (*tensors[:2], None, *tensors[2:])
        return reference.lora_linear(*arguments, 1.7, dropout_p, STATE)

    return call


@DROPOUT
@pytest.mark.parametrize("bias", [False, True])
def test_layer_passes_gradcheck(dropout_p, bias):
    layer = random_layer((3,), 5, 4, 2, torch.float64, bias=bias).training("x", "weight", "bias", "lora_a", "lora_b")
    assert torch.autograd.gradcheck(layer_function(dropout_p, bias), tuple(layer.tensors().values()))


@DROPOUT
def test_layer_passes_gradgradcheck(dropout_p):
    layer = random_layer((2,), 4, 3, 2, torch.float64).training("x", "weight", "bias", "lora_a", "lora_b")
    assert torch.autograd.gradgradcheck(layer_function(dropout_p, True), tuple(layer.tensors().values()))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_backward_operators_are_the_gradients_of_the_forward(dropout_p):
    layer = random_layer((9,), 12, 10, 3, torch.float64).training("x", "lora_a", "lora_b")
    scaling, state = layer.scaling, STATE if dropout_p else None
    y = reference.lora_linear(*layer.tensors().values(), scaling, dropout_p, state)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, (layer.x, layer.lora_a, layer.lora_b), dy)

    with torch.no_grad():
        hidden = reference.lora_shrink(layer.x, layer.lora_a, 1.0, dropout_p, state)
        grad_hidden, grad_b = reference.lora_grad_b(dy, hidden, layer.lora_b, scaling)
        grad_a = reference.lora_factor_grad(layer.x, grad_hidden, 1.0, dropout_p, state, torch.float64, False)
        dx = reference.lora_matmul(dy, layer.weight, None, grad_hidden, layer.lora_a, 1.0, dropout_p, state)
        together = reference.lora_linear_backward(
            dy, layer.x, layer.weight, layer.lora_a, layer.lora_b, hidden, scaling, dropout_p, state, True, True, True
        )
    for actual, composed, gradient in zip((dx, grad_a, grad_b), together, expected, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(composed, gradient, rtol=1e-12, atol=1e-12)


def test_dropped_elements_are_zero_even_where_x_is_not_finite():
    keep = dropout_mask(4, 50, 0.5, STATE)
    x = torch.where(keep, 1.0, float("nan"))
    assert_same_bits(reference.dropped(x, 0.5, STATE), keep * 2.0)


def test_without_a_random_state_nothing_is_dropped():
    x = torch.randn(3, 4)
    assert reference.dropped(x, 0.0, None) is x
    assert reference.dropped(x, 0.0, STATE) is x
