"""`s2ft_linear`, forward and every gradient, on every backend against float64, by the accuracy rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import peft_kernels
from peft_kernels import ops

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.places import dtype_name, places, places_and_dtypes
from ..support.s2ft_layer import KINDS, LAYER_OPERATORS, TENSORS, dense_results, parted, random_s2ft_layer, results

EVERYWHERE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(*LAYER_OPERATORS))
EACH_BACKEND = pytest.mark.parametrize("place", places(*LAYER_OPERATORS))
KIND = pytest.mark.parametrize("kind", KINDS)


def check(layer, place, grad_out=None, **options):
    """Holds y and all gradients of a call to the accuracy rule."""
    layer = layer.training(*TENSORS)
    if grad_out is None:
        shape = (*layer.x.shape[:-1], layer.oriented(layer.weight).shape[0])
        grad_out = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(layer.x.dtype).to(place.device)
    with peft_kernels.use_backend(place.backend):
        found = results(layer, grad_out, **options)
    own, exact = dense_results(layer, grad_out, layer.x.dtype), dense_results(layer, grad_out, torch.float64)
    for name, tensor in found.items():
        assert tensor.dtype == getattr(layer, "x" if name == "y" else name).dtype, name
        assert_accurate(tensor, own[name], exact[name], name if name == "y" else f"gradient of {name}")


@EVERYWHERE
@KIND
@pytest.mark.parametrize("leading", [(), (1,), (33,), (2, 3, 4), (0,), (2, 0, 3)], ids=str)
def test_any_number_of_leading_dimensions(place, dtype, kind, leading):
    for bias in (False, True):
        check(random_s2ft_layer(kind, leading, dtype=dtype, bias=bias, device=place.device), place)


@EVERYWHERE
@KIND
def test_sizes(place, dtype, kind):
    for in_features, out_features in [(1, 1), (1, 40), (40, 1), (7, 129), (129, 7), (64, 64), (100, 257)]:
        count = max(1, (in_features if parted(kind)[0] == "input" else out_features) // 10)
        check(random_s2ft_layer(kind, (17,), in_features, out_features, count, dtype, device=place.device), place)


@EVERYWHERE
@KIND
@pytest.mark.parametrize("count", [0, 1, 19, 20])
def test_from_no_channel_to_all_of_them(place, dtype, kind, count):
    check(random_s2ft_layer(kind, (9,), 20, 20, count=count, dtype=dtype, device=place.device), place)


@pytest.mark.parametrize(
    ("place", "dtype"), places_and_dtypes(*LAYER_OPERATORS, dtypes=(torch.float32, torch.bfloat16, torch.float16))
)
@KIND
@pytest.mark.parametrize("trainable_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
def test_trainable_of_another_dtype(place, dtype, kind, trainable_dtype):
    check(random_s2ft_layer(kind, (29,), dtype=dtype, trainable_dtype=trainable_dtype, device=place.device), place)


@EVERYWHERE
@KIND
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_strides(place, dtype, kind, layout):
    layer = random_s2ft_layer(kind, (2, 5), dtype=dtype, device=place.device)
    for name in ("x", "trainable", "all"):
        check(layer.map(lambda t, n=name: laid_out(t, layout) if n == "all" or t is getattr(layer, n) else t), place)


@EVERYWHERE
@KIND
@pytest.mark.parametrize("layout", [*LAYOUTS[1:], "expanded"])
def test_strides_of_the_incoming_gradient(place, dtype, kind, layout):
    layer = random_s2ft_layer(kind, (3, 7), dtype=dtype, device=place.device)
    grad_out = torch.randn(3, 7, 20).to(dtype).to(place.device)
    one = torch.ones_like(grad_out[:1, :1, :1])  # `y.sum().backward()` hands back one number with strides of zero
    check(layer, place, one.expand(3, 7, 20) if layout == "expanded" else laid_out(grad_out, layout))


@EVERYWHERE
def test_a_slice_that_is_there_already_takes_the_place_of_a_copy(place, dtype):
    layer = random_s2ft_layer("input", (3, 5), dtype=dtype, device=place.device)
    x_slice = layer.x[..., layer.indices]
    check(layer, place, x_slice=x_slice)
    # It is used: a wrong one shows in the gradient of trainable, and there alone.
    with peft_kernels.use_backend(place.backend):
        right = results(layer.training(*TENSORS), x_slice=x_slice)
        wrong = results(layer.training(*TENSORS), x_slice=2 * x_slice)
    for name in ("y", "x", "weight", "bias"):
        assert_same_bits(wrong[name], right[name], name)
    torch.testing.assert_close(wrong["trainable"], 2 * right["trainable"])


@pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(*LAYER_OPERATORS, "swiglu", "swiglu_backward"))
def test_a_block_with_swiglu_in_front(place, dtype):
    layer = random_s2ft_layer("input", (3, 5), dtype=dtype, device=place.device).training("trainable")
    gate, up = (torch.randn(3, 5, 24).to(dtype).to(place.device).requires_grad_() for _ in range(2))

    def block(gate, up, layer):
        h, x_slice = ops.swiglu_s2ft(gate, up, layer.indices)
        return replace(layer, x=h)(x_slice=x_slice)

    def gradients(y, tensors):
        return [y.detach(), *torch.autograd.grad(y, tensors, torch.ones_like(y))]

    with peft_kernels.use_backend(place.backend):
        found = gradients(block(gate, up, layer), [gate, up, layer.trainable])

    def plain(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (gate, up, layer.weight)]
        h = torch.nn.functional.silu(leaves[0]) * leaves[1]
        y = torch.nn.functional.linear(h, leaves[2], layer.bias.to(dtype))
        *first, weight = gradients(y, leaves)
        return [*first, weight[:, layer.indices]]

    for name, *tensors in zip(("y", "gate", "up", "trainable"), found, plain(dtype), plain(torch.float64), strict=True):
        assert_accurate(*tensors, name)


@EVERYWHERE
@KIND
def test_forward_is_that_of_the_frozen_layer_to_the_bit(place, dtype, kind):
    layer = random_s2ft_layer(kind, (3, 5), dtype=dtype, device=place.device)
    expected = torch.nn.functional.linear(layer.x, layer.oriented(layer.weight), layer.bias)
    with peft_kernels.use_backend(place.backend):
        assert_same_bits(layer(), expected)
        assert_same_bits(layer.training("trainable")().detach(), expected)


@EVERYWHERE
@KIND
def test_the_gradient_does_not_depend_on_what_trainable_holds(place, dtype, kind):
    # The slice is in weight already; what is in trainable must not be added once more.
    layer = random_s2ft_layer(kind, dtype=dtype, device=place.device)
    with peft_kernels.use_backend(place.backend):
        one = results(layer.training("x", "trainable"))
        other = results(replace(layer, trainable=1000 * layer.trainable).training("x", "trainable"))
    for name in one:
        assert_same_bits(other[name], one[name], name)


@EVERYWHERE
@KIND
def test_no_argument_is_modified_and_the_bits_are_the_same_from_run_to_run(place, dtype, kind):
    layer = random_s2ft_layer(kind, (300,), 140, 130, 9, dtype, device=place.device).training(*TENSORS)
    before = {name: tensor.detach().clone() for name, tensor in layer.tensors().items()}
    indices, grad_out = layer.indices.clone(), torch.randn(300, 130).to(dtype).to(place.device)
    grad_before = grad_out.clone()
    with peft_kernels.use_backend(place.backend):
        runs = [results(layer, grad_out) for _ in range(2)]
    for name, tensor in layer.tensors().items():
        assert_same_bits(tensor.detach(), before[name], name)
    assert_same_bits(layer.indices, indices, "indices")
    assert_same_bits(grad_out, grad_before, "grad_out")
    for name, tensor in runs[1].items():
        assert_same_bits(tensor, runs[0][name], name)


@EACH_BACKEND
@KIND
def test_backward_writes_the_slice_again_where_the_weight_was_gathered_anew(place, kind):
    # What FSDP does: forward's weight goes, backward's comes from the shards and does not hold what trains.
    layer = random_s2ft_layer(kind, (5,), device=place.device).training("x", "trainable")
    with peft_kernels.use_backend(place.backend):
        y = layer(rewrite=True)
        expected = torch.ones_like(y) @ layer.oriented(layer.weight)
        with torch.autograd._unsafe_preserve_version_counter(layer.weight):
            layer.weight.index_fill_(layer.along(), layer.indices, 7.0)
        (dx,) = torch.autograd.grad(y, layer.x, torch.ones_like(y))
    torch.testing.assert_close(dx, expected)
