"""`lora_linear`, forward and every gradient, on every backend against float64, by the accuracy rule."""

from __future__ import annotations

import pytest
import torch

import peft_kernels

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.lora import (
    TENSORS,
    formula,
    gradients,
    mask_of_seeded_call,
    plain_pytorch,
    random_layer,
    random_state,
    seeded_call,
)
from ..support.places import LAYER_OPERATORS, places, places_and_dtypes

EVERYWHERE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(*LAYER_OPERATORS))
EACH_BACKEND = pytest.mark.parametrize("place", places(*LAYER_OPERATORS))


def check(layer, place, dropout_p=0.0, grad_out=None):
    """Holds y and all five gradients of a call to the accuracy rule; returns y and the gradients."""
    layer = layer.training(*TENSORS)
    keep = mask_of_seeded_call(layer, dropout_p) if dropout_p else None
    with peft_kernels.use_backend(place.backend):
        y = seeded_call(layer, dropout_p)
    if grad_out is None:
        grad_out = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype).to(y.device)
    found = gradients(y, grad_out, layer)

    exact_layer = layer.map(lambda tensor: tensor.detach().double()).training(*TENSORS)
    exact_y = formula(exact_layer, keep, dropout_p)
    exact = gradients(exact_y, grad_out.double(), exact_layer)
    own_layer = layer.training(*TENSORS)
    own_y = plain_pytorch(own_layer, keep, dropout_p)
    own = gradients(own_y, grad_out, own_layer)

    assert y.dtype == layer.x.dtype
    assert_accurate(y, own_y, exact_y, "y")
    for name, gradient in found.items():
        assert gradient.dtype == getattr(layer, name).dtype, name
        assert_accurate(gradient, own[name], exact[name], f"gradient of {name}")
    return y, found


@EVERYWHERE
@pytest.mark.parametrize("leading", [(), (1,), (7,), (33,), (2, 5), (2, 3, 4), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_any_number_of_leading_dimensions(place, dtype, leading, bias):
    check(random_layer(leading, dtype=dtype, bias=bias, device=place.device), place)


@EVERYWHERE
@pytest.mark.parametrize("rank", [1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 64, 65])
def test_ranks(place, dtype, rank):
    check(random_layer((23,), 45, 38, rank, dtype, device=place.device), place, dropout_p=0.1)


@EVERYWHERE
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(1, 1), (1, 40), (40, 1), (7, 129), (129, 7), (64, 64), (100, 257)]
)
def test_sizes(place, dtype, in_features, out_features):
    check(random_layer((17,), in_features, out_features, 4, dtype, device=place.device), place)


@EVERYWHERE
@pytest.mark.parametrize("dropout_p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("leading", [(40,), (3, 9)], ids=str)
def test_dropout(place, dtype, dropout_p, leading):
    check(random_layer(leading, 37, 29, 6, dtype, device=place.device), place, dropout_p)


@pytest.mark.parametrize(
    ("place", "dtype"), places_and_dtypes(*LAYER_OPERATORS, dtypes=(torch.float32, torch.bfloat16, torch.float16))
)
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_factors_of_another_dtype(place, dtype, factor_dtype, dropout_p):
    check(random_layer((29,), 50, 34, 16, dtype, factor_dtype, device=place.device), place, dropout_p)


@EVERYWHERE
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("leading", [(9,), (2, 5)], ids=str)
def test_strides(place, dtype, layout, leading):
    layer = random_layer(leading, 27, 22, 5, dtype, device=place.device)
    check(layer.with_layout(layout), place, dropout_p=0.2)


@EACH_BACKEND
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_strides_of_one_argument(place, name, layout):
    layer = random_layer((4, 6), device=place.device)
    strided = layer.map(lambda tensor: laid_out(tensor, layout) if tensor is getattr(layer, name) else tensor)
    check(strided, place)


@EVERYWHERE
@pytest.mark.parametrize("layout", [*LAYOUTS[1:], "expanded"])
def test_strides_of_the_incoming_gradient(place, dtype, layout):
    layer = random_layer((3, 7), dtype=dtype, device=place.device)
    grad_out = torch.randn(3, 7, 20).to(dtype).to(place.device)
    # `y.sum().backward()` hands back one number with strides of zero.
    one = torch.ones_like(grad_out[:1, :1, :1])
    grad_out = one.expand(3, 7, 20) if layout == "expanded" else laid_out(grad_out, layout)
    check(layer, place, dropout_p=0.2, grad_out=grad_out)


@EACH_BACKEND
@pytest.mark.parametrize("leading", [(3, 1), (1, 5)], ids=str)
def test_expanded_x(place, leading):
    layer = random_layer(leading, device=place.device)
    check(layer.map(lambda t: t.expand(3, 5, 24) if t is layer.x else t), place, dropout_p=0.2)


@EVERYWHERE
def test_gradient_of_a_sum_equals_that_of_ones(place, dtype):
    layer = random_layer((3, 7), dtype=dtype, device=place.device).training(*TENSORS)
    with peft_kernels.use_backend(place.backend):
        layer().sum().backward()
        expected = gradients(layer(), torch.ones(3, 7, 20, dtype=dtype, device=place.device), layer)
    for name, gradient in expected.items():
        # Not bit for bit: the library's matrix product may take another path for other strides.
        torch.testing.assert_close(getattr(layer, name).grad, gradient, msg=lambda text, name=name: f"{name}: {text}")


@EVERYWHERE
def test_call_without_dropout_draws_no_random_numbers(place, dtype):
    layer = random_layer(dtype=dtype, device=place.device)
    before = random_state(place.device)
    with peft_kernels.use_backend(place.backend):
        results = [layer(0.0, training=True), layer(0.0, training=False), layer(0.7, training=False)]
    assert torch.equal(random_state(place.device), before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@EACH_BACKEND
def test_masks_of_successive_calls_differ_and_follow_the_seed(place):
    layer = random_layer((50,), device=place.device)
    with peft_kernels.use_backend(place.backend):
        torch.manual_seed(4)
        first, second = layer(0.5), layer(0.5)
        torch.manual_seed(4)
        again = layer(0.5)
    assert_same_bits(again, first)
    assert not torch.equal(first, second)


@EACH_BACKEND
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_acts_on_the_input_of_lora_a_only(place, dropout_p):
    # With identity factors and no weight the layer returns D * x itself; with a weight, x reaches it whole.
    identity = torch.eye(40, device=place.device)
    layer = random_layer((300,), 40, 40, 40, bias=False, device=place.device)
    layer = layer.map(lambda t: torch.zeros_like(t) if t is layer.weight else t if t is layer.x else identity)
    keep = mask_of_seeded_call(layer, dropout_p)
    with peft_kernels.use_backend(place.backend):
        dropped = seeded_call(layer, dropout_p)
    torch.testing.assert_close(dropped, layer.scaling * layer.x * keep / (1 - dropout_p))
    assert abs((dropped == 0).double().mean().item() - dropout_p) < 5 * (dropout_p * (1 - dropout_p) / 12000) ** 0.5


@EVERYWHERE
def test_everything_dropped_leaves_the_frozen_layer(place, dtype):
    layer = random_layer((6,), dtype=dtype, device=place.device).training("x", "lora_a", "lora_b")
    with peft_kernels.use_backend(place.backend):
        y = seeded_call(layer, 1.0)
        frozen = torch.nn.functional.linear(layer.x, layer.weight, layer.bias)
    found = gradients(y, torch.ones_like(y), layer)
    torch.testing.assert_close(y, frozen)
    assert not found["lora_a"].any()
    assert not found["lora_b"].any()
    assert found["x"].isfinite().all()


@EVERYWHERE
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_no_argument_is_modified(place, dtype, dropout_p):
    layer = random_layer((3, 5), dtype=dtype, device=place.device).training(*TENSORS)
    before = {name: tensor.detach().clone() for name, tensor in layer.tensors().items()}
    grad_out = torch.randn(3, 5, 20).to(dtype).to(place.device)
    grad_before = grad_out.clone()
    with peft_kernels.use_backend(place.backend):
        y = layer(dropout_p)
        y_before = y.detach().clone()
        y.backward(grad_out)
    for name, tensor in layer.tensors().items():
        assert_same_bits(tensor.detach(), before[name], name)
    assert_same_bits(grad_out, grad_before, "grad_out")
    assert_same_bits(y.detach(), y_before, "y")
