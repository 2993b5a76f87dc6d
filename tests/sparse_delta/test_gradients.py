"""`sparse_delta_linear` as a citizen of autograd: what gets a gradient, second backwards, derivatives, torch.func."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch

import peft_kernels
from peft_kernels import ops

from ..support.accuracy import assert_same_bits
from ..support.places import places
from ..support.sparse_layer import LAYER_OPERATORS, TENSORS, dense_results, random_module, random_sparse_layer, results

EACH_BACKEND = pytest.mark.parametrize("place", places(*LAYER_OPERATORS))
EACH_DOUBLE_BACKEND = pytest.mark.parametrize("place", places(*LAYER_OPERATORS, dtypes=(torch.float64,)))
SUBSETS = [names for size in range(1, 5) for names in combinations(TENSORS, size)]


def dense(x, weight, bias, values, indices):
    """The layer over the dense weight, written out; what is added is zero and carries the derivative to values."""
    change = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
    change = change.index_add(0, indices.long(), (values - values.detach()).to(weight.dtype))
    y = torch.einsum("...k,nk->...n", x, weight + change.view_as(weight))
    return y if bias is None else y + bias


def called(layer, function):
    return function(layer.x, layer.weight, layer.bias, layer.values, layer.indices)


@EACH_BACKEND
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_every_choice_of_trained_tensors(place, names):
    layer = random_sparse_layer((3, 5), device=place.device)
    expected = dense_results(layer, torch.ones(3, 5, 20, device=place.device), torch.float64)
    some = layer.training(*names)
    with peft_kernels.use_backend(place.backend):
        y = some()
        y.backward(torch.ones_like(y))
    for name, tensor in some.tensors().items():
        if name in names:
            torch.testing.assert_close(tensor.grad.double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)
        else:
            assert tensor.grad is None, name


@EACH_BACKEND
@pytest.mark.parametrize("leading", [(6,), (2, 3), ()], ids=str)
def test_the_result_may_be_changed_in_place(place, leading):
    layer = random_sparse_layer(leading, device=place.device).training("x", "values")
    with peft_kernels.use_backend(place.backend):
        expected = torch.autograd.grad((layer() * 2).square().sum(), [layer.x, layer.values])
        found = torch.autograd.grad(layer().mul_(2).square().sum(), [layer.x, layer.values])
    for actual, gradient in zip(found, expected, strict=True):
        assert_same_bits(actual, gradient)


@EACH_BACKEND
def test_nothing_trained_gives_no_graph(place):
    layer = random_sparse_layer(device=place.device)
    with peft_kernels.use_backend(place.backend):
        assert not layer().requires_grad
        trained = layer.training(*TENSORS)
        with torch.no_grad():
            assert not trained().requires_grad
        with torch.inference_mode():
            assert trained().is_inference()


@EACH_BACKEND
def test_second_backward_through_a_retained_graph_gives_the_same_bits(place):
    layer = random_sparse_layer((6,), device=place.device).training(*TENSORS)
    with peft_kernels.use_backend(place.backend):
        y = layer()
        wanted = list(layer.tensors().values())
        first = torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=True)
        second = torch.autograd.grad(y, wanted, torch.ones_like(y))
    for left, right in zip(first, second, strict=True):
        assert_same_bits(left, right)


@EACH_DOUBLE_BACKEND
def test_one_layer_used_twice_in_a_graph(place):
    layer = random_sparse_layer((6,), 20, 20, dtype=torch.float64, device=place.device).training(*TENSORS)

    def twice(function):
        return called(replace(layer, x=called(layer, function).tanh()), function)

    wanted = list(layer.tensors().values())
    with peft_kernels.use_backend(place.backend):
        found = torch.autograd.grad(twice(ops.sparse_delta_linear).square().sum(), wanted)
    for actual, expected in zip(found, torch.autograd.grad(twice(dense).square().sum(), wanted), strict=True):
        torch.testing.assert_close(actual, expected)


def as_function(layer, backend):
    """The layer as a function of what trains in it. weight holds a delta of its own, whatever values are."""
    names = [name for name, tensor in layer.tensors().items() if tensor.requires_grad]

    def call(*tensors):
        with peft_kernels.use_backend(backend):
            return replace(layer, **dict(zip(names, tensors, strict=True)))()

    return call, tuple(getattr(layer, name) for name in names)


def added(layer):
    """The layer as the function that its gradients are those of: values join the weight, on top of what it holds."""
    names = [name for name, tensor in layer.tensors().items() if tensor.requires_grad]

    def call(*tensors):
        own = replace(layer, **dict(zip(names, tensors, strict=True)))
        change = torch.zeros_like(own.weight).view(-1).index_add(0, layer.indices.long(), own.values - layer.values)
        return own.x @ (own.weight + change.view_as(own.weight)).t() + own.bias

    return call


@EACH_DOUBLE_BACKEND
@pytest.mark.parametrize("leading", [(3,), (2, 2), ()], ids=str)
def test_gradcheck(place, leading):
    layer = random_sparse_layer(leading, 5, 4, 7, torch.float64, device=place.device).training("x", "weight", "bias")
    call, tensors = as_function(layer, place.backend)
    assert torch.autograd.gradcheck(call, tensors)


@EACH_DOUBLE_BACKEND
def test_the_gradient_of_values_is_the_slope_of_the_dense_function(place):
    # gradcheck cannot move values: the forward reads weight alone. So their numerical slope is that of `added`.
    layer = random_sparse_layer((3,), 5, 4, 7, torch.float64, device=place.device).training("values")
    with peft_kernels.use_backend(place.backend):
        jacobian = torch.autograd.functional.jacobian(lambda values: replace(layer, values=values)(), layer.values)
    step = 1e-6
    for entry in range(7):
        change = torch.zeros_like(layer.values).index_fill(0, torch.tensor(entry, device=place.device), step)
        slope = (added(layer)(layer.values + change) - added(layer)(layer.values - change)) / (2 * step)
        torch.testing.assert_close(jacobian[..., entry], slope.detach(), rtol=1e-6, atol=1e-8)


@EACH_DOUBLE_BACKEND
@pytest.mark.parametrize("names", [names for names in SUBSETS if "values" not in names], ids="+".join)
def test_gradgradcheck(place, names):
    layer = random_sparse_layer((2,), 4, 3, 5, torch.float64, device=place.device).training(*names)
    call, tensors = as_function(layer, place.backend)
    assert torch.autograd.gradgradcheck(call, tensors)


def penalty(y, wanted):
    """y squared and the squared norm of its gradients: a gradient penalty, whose gradient needs a double backward."""
    first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
    return y.square().sum() + sum(gradient.square().sum() for gradient in first)


@EACH_DOUBLE_BACKEND
@pytest.mark.parametrize("leading", [(4,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_double_backward_is_that_of_the_dense_layer(place, names, leading):
    layer = random_sparse_layer(leading, 6, 5, 9, torch.float64, device=place.device).training(*names)
    wanted = [getattr(layer, name) for name in names]
    expected = torch.autograd.grad(penalty(called(layer, dense), wanted), wanted)
    with peft_kernels.use_backend(place.backend):
        found = torch.autograd.grad(penalty(layer(), wanted), wanted)
    for actual, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, gradient)


@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_create_graph_keeps_values_shapes_and_dtypes(place, dtype):
    layer = random_sparse_layer((2, 6), dtype=dtype, device=place.device).training(*TENSORS)
    with peft_kernels.use_backend(place.backend):
        plain = results(layer)
        found = torch.autograd.grad(layer().sum(), list(layer.tensors().values()), create_graph=True)
    for (name, tensor), gradient in zip(layer.tensors().items(), found, strict=True):
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype), name
        torch.testing.assert_close(gradient.detach(), plain[name], rtol=0.02, atol=0.05, msg=name)


@EACH_DOUBLE_BACKEND
def test_functional_gradients(place):
    layer = random_sparse_layer((5,), dtype=torch.float64, device=place.device)

    def loss(function):
        return lambda *tensors: function(*tensors, layer.indices).square().sum()

    tensors = tuple(layer.tensors().values())
    with peft_kernels.use_backend(place.backend):
        found = torch.func.grad(loss(ops.sparse_delta_linear), argnums=(0, 1, 2, 3))(*tensors)
    for actual, expected in zip(found, torch.func.grad(loss(dense), argnums=(0, 1, 2, 3))(*tensors), strict=True):
        torch.testing.assert_close(actual, expected)


@EACH_DOUBLE_BACKEND
def test_gradients_per_sample(place):
    layer = random_sparse_layer((5,), dtype=torch.float64, device=place.device)

    def loss(values, x):
        return replace(layer, x=x, values=values)().square().sum()

    with peft_kernels.use_backend(place.backend):
        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(layer.values, layer.x)
    for row, actual in zip(layer.x, found, strict=True):
        grad_out = 2 * called(replace(layer, x=row), dense)
        torch.testing.assert_close(actual, torch.outer(grad_out, row).flatten()[layer.indices.long()])


def test_forward_mode_derivatives():
    layer = random_sparse_layer((5,), dtype=torch.float64)
    tangents = tuple(torch.randn_like(tensor) for tensor in layer.tensors().values())

    def function(call):
        return lambda *tensors: call(*tensors, layer.indices)

    found = torch.func.jvp(function(ops.sparse_delta_linear), tuple(layer.tensors().values()), tangents)
    expected = torch.func.jvp(function(dense), tuple(layer.tensors().values()), tangents)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_a_module_as_a_function_of_its_values_and_then_as_itself_again():
    layer, _ = random_module(dtype=torch.float64)
    x, other = torch.randn(5, 24, dtype=torch.float64), torch.randn(37, dtype=torch.float64)
    before = layer(x).detach()

    def loss(values):
        return torch.func.functional_call(layer, {"values": values}, x).square().sum()

    found = torch.func.grad(loss)(other)
    with torch.no_grad():
        layer.values.copy_(other)
    layer(x).square().sum().backward()
    torch.testing.assert_close(found, layer.values.grad)
    with torch.no_grad():
        layer.values.copy_(random_module(dtype=torch.float64)[0].values)
    assert_same_bits(layer(x).detach(), before)


@pytest.mark.parametrize("changed", ["weight", "values", "indices", "x"])
def test_what_was_changed_in_place_before_backward_is_noticed(changed):
    layer = random_sparse_layer((8,)).training("x", "values")
    layer = replace(layer, indices=layer.indices.clone())
    y = layer()
    with torch.no_grad():
        getattr(layer, changed).mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@EACH_BACKEND
def test_the_observer_sees_what_the_gradient_is_made_of(place):
    layer = random_sparse_layer((2, 3), device=place.device).training("x", "values")
    seen = []
    grad_out = torch.randn(2, 3, 20).to(place.device)
    with peft_kernels.use_backend(place.backend):
        y = layer(observer=lambda dy, x: seen.append((dy, x)))
        assert not seen
        torch.autograd.grad(y, [layer.x, layer.values], grad_out, retain_graph=True)
        torch.autograd.grad(y, [layer.x, layer.values], grad_out, create_graph=True)
    for dy, x in seen:
        assert not dy.requires_grad and not x.requires_grad
        assert_same_bits(dy, grad_out.view(6, 20))
        assert_same_bits(x, layer.x.detach().view(6, 24))
    assert len(seen) == 2


@EACH_BACKEND
def test_the_observer_is_left_alone_while_values_do_not_train(place):
    layer = random_sparse_layer(device=place.device).training("x", "bias")
    with peft_kernels.use_backend(place.backend):
        layer(observer=lambda dy, x: pytest.fail("values get no gradient")).sum().backward()
