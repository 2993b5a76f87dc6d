"""`sparse_delta_linear`, forward and every gradient, on every backend against float64, by the accuracy rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import peft_kernels

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.places import dtype_name, places, places_and_dtypes
from ..support.sparse_layer import LAYER_OPERATORS, TENSORS, dense_results, random_sparse_layer, results

EVERYWHERE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(*LAYER_OPERATORS))
EACH_BACKEND = pytest.mark.parametrize("place", places(*LAYER_OPERATORS))
INDICES = pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=dtype_name)


def check(layer, place, grad_out=None):
    """Holds y and all gradients of a call to the accuracy rule."""
    layer = layer.training(*TENSORS)
    if grad_out is None:
        shape = (*layer.x.shape[:-1], layer.weight.shape[0])
        grad_out = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(layer.x.dtype).to(place.device)
    with peft_kernels.use_backend(place.backend):
        found = results(layer, grad_out)
    own, exact = dense_results(layer, grad_out, layer.x.dtype), dense_results(layer, grad_out, torch.float64)
    for name, tensor in found.items():
        assert tensor.dtype == getattr(layer, "x" if name == "y" else name).dtype, name
        assert_accurate(tensor, own[name], exact[name], name if name == "y" else f"gradient of {name}")


@EVERYWHERE
@pytest.mark.parametrize("leading", [(), (1,), (7,), (33,), (2, 5), (2, 3, 4), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_any_number_of_leading_dimensions(place, dtype, leading, bias):
    check(random_sparse_layer(leading, dtype=dtype, bias=bias, device=place.device), place)


@EVERYWHERE
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(1, 1), (1, 40), (40, 1), (7, 129), (129, 7), (64, 64), (100, 257)]
)
def test_sizes(place, dtype, in_features, out_features):
    count = max(1, in_features * out_features // 20)
    check(random_sparse_layer((17,), in_features, out_features, count, dtype, device=place.device), place)


@EVERYWHERE
@INDICES
@pytest.mark.parametrize("count", [0, 1, 2, 240, 479, 480])
def test_from_no_entry_to_all_of_them(place, dtype, index_dtype, count):
    check(random_sparse_layer((9,), count=count, dtype=dtype, index_dtype=index_dtype, device=place.device), place)


@pytest.mark.parametrize(
    ("place", "dtype"), places_and_dtypes(*LAYER_OPERATORS, dtypes=(torch.float32, torch.bfloat16, torch.float16))
)
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
def test_values_of_another_dtype(place, dtype, values_dtype):
    check(random_sparse_layer((29,), dtype=dtype, values_dtype=values_dtype, device=place.device), place)


@EVERYWHERE
@pytest.mark.parametrize("name", ["x", "values", "all"])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_strides(place, dtype, name, layout):
    layer = random_sparse_layer((2, 5), dtype=dtype, device=place.device)
    check(layer.map(lambda t: laid_out(t, layout) if name == "all" or t is getattr(layer, name) else t), place)


@EVERYWHERE
@pytest.mark.parametrize("layout", [*LAYOUTS[1:], "expanded"])
def test_strides_of_the_incoming_gradient(place, dtype, layout):
    layer = random_sparse_layer((3, 7), dtype=dtype, device=place.device)
    grad_out = torch.randn(3, 7, 20).to(dtype).to(place.device)
    one = torch.ones_like(grad_out[:1, :1, :1])  # `y.sum().backward()` hands back one number with strides of zero
    check(layer, place, one.expand(3, 7, 20) if layout == "expanded" else laid_out(grad_out, layout))


@EACH_BACKEND
@pytest.mark.parametrize("leading", [(3, 1), (1, 5)], ids=str)
def test_expanded_x(place, leading):
    layer = random_sparse_layer(leading, device=place.device)
    check(replace(layer, x=layer.x.expand(3, 5, 24)), place)


@EVERYWHERE
def test_forward_is_that_of_the_frozen_layer_to_the_bit(place, dtype):
    layer = random_sparse_layer((3, 5), dtype=dtype, device=place.device)
    with peft_kernels.use_backend(place.backend):
        assert_same_bits(layer(), torch.nn.functional.linear(layer.x, layer.weight, layer.bias))


@EVERYWHERE
def test_the_gradient_of_values_does_not_depend_on_their_size(place, dtype):
    # The delta is in weight already; what is in values must not be added once more.
    layer = random_sparse_layer(dtype=dtype, device=place.device)
    with peft_kernels.use_backend(place.backend):
        one = results(layer.training("values"))
        other = results(replace(layer, values=1000 * layer.values).training("values"))
    for name in one:
        assert_same_bits(other[name], one[name], name)


@EVERYWHERE
def test_no_argument_is_modified(place, dtype):
    layer = random_sparse_layer((3, 5), dtype=dtype, device=place.device).training(*TENSORS)
    before = {name: tensor.detach().clone() for name, tensor in layer.tensors().items()}
    indices, grad_out = layer.indices.clone(), torch.randn(3, 5, 20).to(dtype).to(place.device)
    grad_before = grad_out.clone()
    with peft_kernels.use_backend(place.backend):
        results(layer, grad_out)
    for name, tensor in layer.tensors().items():
        assert_same_bits(tensor.detach(), before[name], name)
    assert_same_bits(layer.indices, indices, "indices")
    assert_same_bits(grad_out, grad_before, "grad_out")


@EVERYWHERE
def test_same_bits_from_run_to_run(place, dtype):
    layer = random_sparse_layer((300,), 140, 130, 500, dtype, device=place.device).training(*TENSORS)
    grad_out = torch.randn(300, 130).to(dtype).to(place.device)
    with peft_kernels.use_backend(place.backend):
        runs = [results(layer, grad_out) for _ in range(3)]
    for run in runs[1:]:
        for name, tensor in run.items():
            assert_same_bits(tensor, runs[0][name], name)


@EACH_BACKEND
def test_backward_writes_the_delta_again_where_the_weight_was_gathered_anew(place):
    # What FSDP does: forward's weight goes, backward's comes from the shards and does not hold the delta.
    layer = random_sparse_layer((5,), device=place.device).training("x", "values")
    positions = layer.indices.long()
    original = torch.randn(37, device=place.device)
    layer.weight.view(-1)[positions] = original + layer.values.detach()
    with peft_kernels.use_backend(place.backend):
        y = layer(original=original)
        expected = torch.ones_like(y) @ layer.weight
        with torch.autograd._unsafe_preserve_version_counter(layer.weight):
            layer.weight.view(-1)[positions] = original
        (dx,) = torch.autograd.grad(y, layer.x, torch.ones_like(y))
    torch.testing.assert_close(dx, expected)
