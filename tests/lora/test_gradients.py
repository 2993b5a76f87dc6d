"""`lora_linear` as a citizen of autograd: what gets a gradient, several backwards, double use, double backward."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

import peft_kernels
from peft_kernels import ops

from ..support.accuracy import assert_same_bits
from ..support.lora import TENSORS, formula, gradients, mask_of_seeded_call, random_layer, seeded_call
from ..support.places import LAYER_OPERATORS, places

EACH_BACKEND = pytest.mark.parametrize("place", places(*LAYER_OPERATORS))
EACH_DOUBLE_BACKEND = pytest.mark.parametrize("place", places(*LAYER_OPERATORS, dtypes=(torch.float64,)))
SUBSETS = [names for size in range(1, 6) for names in combinations(TENSORS, size)]


@EACH_BACKEND
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_every_choice_of_trained_tensors(place, names, dropout_p):
    layer = random_layer((3, 5), device=place.device)
    with peft_kernels.use_backend(place.backend):
        everything = layer.training(*TENSORS)
        y = seeded_call(everything, dropout_p)
        expected = gradients(y, torch.ones_like(y), everything)
        some = layer.training(*names)
        y = seeded_call(some, dropout_p)
        y.backward(torch.ones_like(y))
    for name, tensor in some.tensors().items():
        if name in names:
            torch.testing.assert_close(tensor.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert tensor.grad is None, name


@EACH_BACKEND
def test_nothing_trained_gives_no_graph(place):
    with peft_kernels.use_backend(place.backend):
        assert not random_layer(device=place.device)(0.3).requires_grad
        trained = random_layer(device=place.device).training(*TENSORS)
        with torch.no_grad():
            assert not trained(0.3).requires_grad
        with torch.inference_mode():
            assert trained().is_inference()


@EACH_BACKEND
def test_gradients_accumulate_over_calls(place):
    layer = random_layer((6,), device=place.device).training("lora_a", "lora_b")
    with peft_kernels.use_backend(place.backend):
        single = gradients(seeded_call(layer, 0.2), torch.ones(6, 20, device=place.device), layer)
        for _ in range(3):
            seeded_call(layer, 0.2).sum().backward()
    for name in ("lora_a", "lora_b"):
        torch.testing.assert_close(getattr(layer, name).grad, 3 * single[name])


@EACH_BACKEND
def test_second_backward_through_a_retained_graph_gives_the_same_bits(place):
    layer = random_layer((6,), device=place.device).training(*TENSORS)
    grad_out = torch.randn(6, 20).to(place.device)
    with peft_kernels.use_backend(place.backend):
        y = layer(0.3)
        wanted = list(layer.tensors().values())
        first = torch.autograd.grad(y, wanted, grad_out, retain_graph=True)
        second = torch.autograd.grad(y, wanted, grad_out)
    for left, right in zip(first, second, strict=True):
        assert_same_bits(left, right)


@EACH_DOUBLE_BACKEND
def test_one_layer_used_twice_in_a_graph(place):
    layer = random_layer((6,), 20, 20, 3, torch.float64, device=place.device).training(*TENSORS)

    def twice(call):
        inner = call(layer)
        return call(type(layer)(inner.tanh(), *list(layer.tensors().values())[1:], layer.scaling))

    with peft_kernels.use_backend(place.backend):
        actual = twice(lambda used: used())
        found = gradients(actual, torch.ones_like(actual), layer)
    expected = twice(formula)
    torch.testing.assert_close(actual, expected)
    for name, gradient in gradients(expected, torch.ones_like(expected), layer).items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def seeded_function(dropout_p, bias):
    """`lora_linear` as a pure function of its tensors: every evaluation draws the same mask."""

    def call(*tensors):
        torch.manual_seed(2)
        arguments = tensors if bias else (*tensors[:2], None, *tensors[2:])
        return ops.lora_linear(*arguments, 1.3, dropout_p, True)

    return call


@EACH_DOUBLE_BACKEND
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(3,), (2, 2), ()], ids=str)
def test_gradcheck(place, dropout_p, bias, leading):
    layer = random_layer(leading, 5, 4, 2, torch.float64, bias=bias, device=place.device).training(*TENSORS)
    with peft_kernels.use_backend(place.backend):
        assert torch.autograd.gradcheck(seeded_function(dropout_p, bias), tuple(layer.tensors().values()))


@EACH_DOUBLE_BACKEND
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("x",), ("weight", "lora_b"), ("bias", "lora_a")], ids=str)
def test_gradgradcheck(place, dropout_p, frozen):
    trained = [name for name in TENSORS if name not in frozen]
    layer = random_layer((2,), 4, 3, 2, torch.float64, device=place.device).training(*trained)
    with peft_kernels.use_backend(place.backend):
        assert torch.autograd.gradgradcheck(seeded_function(dropout_p, True), tuple(layer.tensors().values()))


@EACH_DOUBLE_BACKEND
@pytest.mark.parametrize("names", [("x",), ("x", "bias"), ("lora_b",), ("lora_b", "bias")], ids="+".join)
def test_double_backward_where_x_is_not_saved(place, names):
    layer = random_layer((4,), 6, 5, 2, torch.float64, device=place.device).training(*names)
    wanted = [getattr(layer, name) for name in names]
    expected = torch.autograd.grad(_penalty(formula(layer), wanted), wanted)
    with peft_kernels.use_backend(place.backend):
        found = torch.autograd.grad(_penalty(layer(), wanted), wanted)
    for actual, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, gradient)


def test_double_backward_that_would_need_an_unsaved_x_is_refused():
    layer = random_layer((4,)).training("x", "lora_b")
    with pytest.raises(RuntimeError, match="double backward through lora_linear needs lora_a or weight to require"):
        torch.autograd.grad(layer().square().sum(), [layer.x, layer.lora_b], create_graph=True)


def _penalty(y, wanted):
    """y squared and the squared norm of its gradients: a gradient penalty, whose gradient needs a double backward."""
    first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
    return y.square().sum() + sum(gradient.square().sum() for gradient in first)


@EACH_DOUBLE_BACKEND
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_first_gradients_with_create_graph_equal_those_without(place, dropout_p):
    layer = random_layer((2, 6), dtype=torch.float64, device=place.device).training(*TENSORS)
    wanted = list(layer.tensors().values())
    with peft_kernels.use_backend(place.backend):
        plain = torch.autograd.grad(seeded_call(layer, dropout_p).square().sum(), wanted)
        differentiable = torch.autograd.grad(seeded_call(layer, dropout_p).square().sum(), wanted, create_graph=True)
    for left, right in zip(differentiable, plain, strict=True):
        torch.testing.assert_close(left, right)


@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_create_graph_keeps_shapes_and_dtypes_of_mixed_precision(place, dtype):
    layer = random_layer((2, 6), dtype=dtype, factor_dtype=torch.float32, device=place.device).training(*TENSORS)
    with peft_kernels.use_backend("reference"):
        y = layer(0.3)
        found = torch.autograd.grad(y.float().square().sum(), list(layer.tensors().values()), create_graph=True)
    for gradient, tensor in zip(found, layer.tensors().values(), strict=True):
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)


@EACH_DOUBLE_BACKEND
def test_functional_gradients(place):
    layer = random_layer((5,), dtype=torch.float64, device=place.device)
    tensors = tuple(layer.tensors().values())

    def loss(*arguments):
        return ops.lora_linear(*arguments, layer.scaling).square().sum()

    with peft_kernels.use_backend(place.backend):
        found = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(*tensors)
    trained = layer.training(*TENSORS)
    y = formula(trained)
    expected = gradients(y, 2 * y.detach(), trained)
    for name, gradient in zip(TENSORS, found, strict=True):
        torch.testing.assert_close(gradient, expected[name])


@EACH_DOUBLE_BACKEND
def test_gradients_follow_the_mask_of_the_forward(place):
    layer = random_layer((8,), dtype=torch.float64, device=place.device).training(*TENSORS)
    keep = mask_of_seeded_call(layer, 0.5)
    with peft_kernels.use_backend(place.backend):
        y = seeded_call(layer, 0.5)
        torch.manual_seed(99)  # what happens to the generator in between does not matter
        found = gradients(y, torch.ones_like(y), layer)
    expected = gradients(formula(layer, keep, 0.5), torch.ones_like(y), layer)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_an_input_changed_in_place_before_backward_is_noticed():
    layer = random_layer((8,)).training("lora_a", "lora_b")
    y = layer()
    with torch.no_grad():
        layer.lora_a.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
