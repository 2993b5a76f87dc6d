"""`s2ft_linear` as a citizen of autograd: what gets a gradient, second backwards, derivatives, torch.func."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch.nn.functional import silu

import peft_kernels
from peft_kernels import ops

from ..support.accuracy import assert_same_bits
from ..support.places import places
from ..support.s2ft_layer import KINDS, LAYER_OPERATORS, TENSORS, dense_results, random_s2ft_layer, results

EACH_BACKEND = pytest.mark.parametrize("place", places(*LAYER_OPERATORS))
EACH_DOUBLE_BACKEND = pytest.mark.parametrize("place", places(*LAYER_OPERATORS, dtypes=(torch.float64,)))
KIND = pytest.mark.parametrize("kind", KINDS)
SUBSETS = [names for size in range(1, 5) for names in combinations(TENSORS, size)]


def dense(x, weight, bias, trainable, indices, dim, transposed=False):
    """The layer over the dense weight, written out; what is added is zero and carries the derivative to trainable."""
    if transposed:
        weight, trainable = weight.t(), trainable.t()
    change = (trainable - trainable.detach()).to(weight.dtype)
    live = torch.zeros_like(weight).index_add(1 if dim == "input" else 0, indices, change) + weight
    y = torch.einsum("...k,nk->...n", x, live)
    return y if bias is None else y + bias


@EACH_BACKEND
@KIND
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_every_choice_of_trained_tensors(place, kind, names):
    layer = random_s2ft_layer(kind, (3, 5), device=place.device)
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
@KIND
def test_nothing_trained_gives_no_graph(place, kind):
    layer = random_s2ft_layer(kind, device=place.device)
    with peft_kernels.use_backend(place.backend):
        assert not layer().requires_grad
        trained = layer.training(*TENSORS)
        with torch.no_grad():
            assert not trained().requires_grad
        with torch.inference_mode():
            assert trained().is_inference()


@EACH_BACKEND
@KIND
def test_second_backward_through_a_retained_graph_gives_the_same_bits(place, kind):
    layer = random_s2ft_layer(kind, (6,), device=place.device).training(*TENSORS)
    with peft_kernels.use_backend(place.backend):
        y = layer()
        wanted = list(layer.tensors().values())
        first = torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=True)
        second = torch.autograd.grad(y, wanted, torch.ones_like(y))
    for left, right in zip(first, second, strict=True):
        assert_same_bits(left, right)


@EACH_BACKEND
@KIND
@pytest.mark.parametrize("leading", [(6,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_result_may_be_changed_in_place(place, kind, leading, bias):
    layer = random_s2ft_layer(kind, leading, bias=bias, device=place.device).training("x", "trainable")
    wanted = [layer.x, layer.trainable]
    with peft_kernels.use_backend(place.backend):
        expected = torch.autograd.grad((layer() * 2).square().sum(), wanted)
        found = torch.autograd.grad(layer().mul_(2).square().sum(), wanted)
    for actual, gradient in zip(found, expected, strict=True):
        assert_same_bits(actual, gradient)


@EACH_BACKEND
@KIND
def test_gradients_accumulate(place, kind):
    layer = random_s2ft_layer(kind, (6,), device=place.device).training("trainable")
    with peft_kernels.use_backend(place.backend):
        first, second = (replace(layer, x=scale * layer.x) for scale in (1.0, -0.7))
        alone = [results(part)["trainable"] for part in (first, second)]
        first().sum().backward()
        second().sum().backward()
    assert_same_bits(layer.trainable.grad, alone[0] + alone[1])


@EACH_DOUBLE_BACKEND
@KIND
def test_one_layer_used_twice_in_a_graph(place, kind):
    layer = random_s2ft_layer(kind, (6,), 20, 20, dtype=torch.float64, device=place.device).training(*TENSORS)

    def twice(function):
        return replace(layer, x=layer.call(function).tanh()).call(function)

    wanted = list(layer.tensors().values())
    with peft_kernels.use_backend(place.backend):
        found = torch.autograd.grad(twice(ops.s2ft_linear).square().sum(), wanted)
    for actual, expected in zip(found, torch.autograd.grad(twice(dense).square().sum(), wanted), strict=True):
        torch.testing.assert_close(actual, expected)


def as_function(layer, backend, **options):
    """The layer as a function of what trains in it. weight holds a slice of its own, whatever trainable is."""
    names = [name for name, tensor in layer.tensors().items() if tensor.requires_grad]

    def call(*tensors):
        with peft_kernels.use_backend(backend):
            return replace(layer, **dict(zip(names, tensors, strict=True)))(**options)

    return call, tuple(getattr(layer, name) for name in names)


@EACH_DOUBLE_BACKEND
@KIND
@pytest.mark.parametrize("leading", [(3,), (2, 2), ()], ids=str)
def test_gradcheck(place, kind, leading):
    layer = random_s2ft_layer(kind, leading, 5, 4, 2, torch.float64, device=place.device).training(
        "x", "weight", "bias"
    )
    assert torch.autograd.gradcheck(*as_function(layer, place.backend))


@EACH_DOUBLE_BACKEND
@KIND
def test_the_gradient_of_trainable_is_the_slope_of_the_dense_function(place, kind):
    # gradcheck cannot move trainable: the forward reads weight alone. So its numerical slope is that of weight there.
    layer = random_s2ft_layer(kind, (3,), 5, 4, 2, torch.float64, device=place.device).training("trainable")
    with peft_kernels.use_backend(place.backend):
        jacobian = torch.autograd.functional.jacobian(lambda t: replace(layer, trainable=t)(), layer.trainable)
    step = 1e-6
    for entry in range(layer.trainable.numel()):
        change = torch.zeros_like(layer.trainable)
        change.view(-1)[entry] = step
        change = torch.zeros_like(layer.weight).index_copy(layer.along(), layer.indices, change)
        up, down = (layer.x @ layer.oriented(layer.weight + sign * change).t() for sign in (1, -1))
        slope = ((up - down) / (2 * step)).detach()
        torch.testing.assert_close(jacobian.flatten(2)[..., entry], slope, rtol=1e-6, atol=1e-8)


@EACH_DOUBLE_BACKEND
@KIND
@pytest.mark.parametrize("names", [names for names in SUBSETS if "trainable" not in names], ids="+".join)
def test_gradgradcheck(place, kind, names):
    layer = random_s2ft_layer(kind, (2,), 4, 3, 2, torch.float64, device=place.device).training(*names)
    assert torch.autograd.gradgradcheck(*as_function(layer, place.backend))


def of_tensors(layer, function, tensors):
    """`function` of the layer with other tensors in their places."""
    return replace(layer, **dict(zip(TENSORS, tensors, strict=True))).call(function)


def penalty(y, wanted):
    """y squared and the squared norm of its gradients: a gradient penalty, whose gradient needs a double backward."""
    first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
    return y.square().sum() + sum(gradient.square().sum() for gradient in first)


@EACH_DOUBLE_BACKEND
@KIND
@pytest.mark.parametrize("leading", [(4,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_double_backward_is_that_of_the_dense_layer(place, kind, names, leading):
    layer = random_s2ft_layer(kind, leading, 6, 5, 3, torch.float64, device=place.device).training(*names)
    wanted = [getattr(layer, name) for name in names]
    expected = torch.autograd.grad(penalty(layer.call(dense), wanted), wanted)
    with peft_kernels.use_backend(place.backend):
        found = torch.autograd.grad(penalty(layer(), wanted), wanted)
    for actual, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, gradient)


@EACH_DOUBLE_BACKEND
def test_a_penalty_on_the_gradient_of_trainable_alone_reaches_x(place):
    # It reaches x by the columns that were kept, and by nothing else.
    layer = random_s2ft_layer("input", (2, 3), 6, 5, 3, torch.float64, device=place.device).training("x", "trainable")

    def reached(y):
        (first,) = torch.autograd.grad(y.sum(), layer.trainable, create_graph=True)
        return torch.autograd.grad(first.square().sum(), layer.x)[0]

    with peft_kernels.use_backend(place.backend):
        found = reached(layer())
    torch.testing.assert_close(found, reached(layer.call(dense)))
    assert found.any()


@EACH_DOUBLE_BACKEND
@pytest.mark.parametrize("names", [("trainable",), ("weight", "trainable")], ids="+".join)
def test_double_backward_of_a_block_with_swiglu_in_front(place, names):
    layer = random_s2ft_layer("input", (2, 3), 6, 5, 3, torch.float64, device=place.device).training(*names)
    gate, up = (torch.randn(2, 3, 6, dtype=torch.float64, device=place.device).requires_grad_() for _ in range(2))
    wanted = [gate, up, *(getattr(layer, name) for name in names)]

    def fused():
        h, x_slice = ops.swiglu_s2ft(gate, up, layer.indices)
        return replace(layer, x=h)(x_slice=x_slice)

    with peft_kernels.use_backend(place.backend):
        found = torch.autograd.grad(penalty(fused(), wanted), wanted)
    plain = replace(layer, x=silu(gate) * up).call(dense)
    for actual, gradient in zip(found, torch.autograd.grad(penalty(plain, wanted), wanted), strict=True):
        torch.testing.assert_close(actual, gradient)


@EACH_BACKEND
@KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_create_graph_keeps_values_shapes_and_dtypes(place, kind, dtype):
    layer = random_s2ft_layer(kind, (2, 6), dtype=dtype, device=place.device).training(*TENSORS)
    with peft_kernels.use_backend(place.backend):
        plain = results(layer)
        found = torch.autograd.grad(layer().sum(), list(layer.tensors().values()), create_graph=True)
    for (name, tensor), gradient in zip(layer.tensors().items(), found, strict=True):
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype), name
        torch.testing.assert_close(gradient.detach(), plain[name], rtol=0.02, atol=0.05, msg=name)


@EACH_DOUBLE_BACKEND
@KIND
def test_functional_gradients(place, kind):
    layer = random_s2ft_layer(kind, (5,), dtype=torch.float64, device=place.device)

    def loss(function):
        return lambda *tensors: of_tensors(layer, function, tensors).square().sum()

    tensors = tuple(layer.tensors().values())
    with peft_kernels.use_backend(place.backend):
        found = torch.func.grad(loss(ops.s2ft_linear), argnums=(0, 1, 2, 3))(*tensors)
    for actual, expected in zip(found, torch.func.grad(loss(dense), argnums=(0, 1, 2, 3))(*tensors), strict=True):
        torch.testing.assert_close(actual, expected)


@EACH_DOUBLE_BACKEND
@KIND
def test_gradients_per_sample(place, kind):
    layer = random_s2ft_layer(kind, (5,), dtype=torch.float64, device=place.device)

    def loss(trainable, x):
        return replace(layer, x=x, trainable=trainable)().square().sum()

    with peft_kernels.use_backend(place.backend):
        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(layer.trainable, layer.x)
    for row, actual in zip(layer.x, found, strict=True):
        grad_out = 2 * replace(layer, x=row).call(dense)
        expected = layer.oriented(torch.outer(grad_out, row)).index_select(layer.along(), layer.indices)
        torch.testing.assert_close(actual, expected)


@KIND
def test_forward_mode_derivatives(kind):
    layer = random_s2ft_layer(kind, (5,), dtype=torch.float64)
    tensors = tuple(layer.tensors().values())
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)

    def derivative(function):
        return torch.func.jvp(lambda *tensors: of_tensors(layer, function, tensors), tensors, tangents)

    for actual, wanted in zip(derivative(ops.s2ft_linear), derivative(dense), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("layer", ["", " of Conv1D"], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize(("dim", "changed"), [("input", "weight"), ("input", "trainable"), ("output", "x")])
def test_what_was_changed_in_place_before_backward_is_noticed(dim, changed, layer):
    layer = random_s2ft_layer(dim + layer, (8,)).training("x", "trainable")
    y = layer()
    with torch.no_grad():
        getattr(layer, changed).mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_x_may_be_changed_in_place_where_only_its_columns_are_kept():
    layer = random_s2ft_layer("input", (8,)).training("trainable")
    expected = results(layer)
    x = layer.x.clone()
    y = replace(layer, x=x)()
    x.zero_()
    y.sum().backward()
    assert_same_bits(layer.trainable.grad, expected["trainable"])
