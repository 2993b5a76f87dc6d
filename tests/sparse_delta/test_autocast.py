"""`sparse_delta_linear` under autocast: activations and weight in the autocast dtype, values in their own."""

from __future__ import annotations

import pytest
import torch

import peft_kernels

from ..support.accuracy import assert_same_bits
from ..support.places import places
from ..support.sparse_layer import LAYER_OPERATORS, TENSORS, random_module, random_sparse_layer, results

PLACES = pytest.mark.parametrize("place", places(*LAYER_OPERATORS, dtypes=(torch.bfloat16,)))
HALF = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])


@PLACES
@HALF
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_explicit_cast(place, half, dtype):
    layer = random_sparse_layer((3, 5), dtype=dtype, device=place.device).training(*TENSORS)
    explicit = layer.map(lambda t: t if t is layer.values else t.detach().to(half)).training(*TENSORS)
    with peft_kernels.use_backend(place.backend):
        with torch.autocast(place.device, half):
            actual = results(layer)
        expected = results(explicit)
    assert actual["y"].dtype == half
    for name, tensor in actual.items():
        if name != "y":
            assert tensor.dtype == getattr(layer, name).dtype, name
        assert_same_bits(tensor, expected[name].to(tensor.dtype), name)


@PLACES
def test_disabled_inside_means_full_precision(place):
    layer = random_sparse_layer((4,), device=place.device)
    with peft_kernels.use_backend(place.backend):
        with torch.autocast(place.device, torch.bfloat16), torch.autocast(place.device, enabled=False):
            inside = layer()
        assert_same_bits(inside, layer())


@PLACES
def test_backward_outside_and_inside_the_context_are_the_same(place):
    layer = random_sparse_layer((4,), device=place.device).training(*TENSORS)
    wanted = list(layer.tensors().values())
    with peft_kernels.use_backend(place.backend):
        with torch.autocast(place.device, torch.bfloat16):
            y = layer()
            inside = torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=True)
        outside = torch.autograd.grad(y, wanted, torch.ones_like(y))
    for left, right in zip(outside, inside, strict=True):
        assert_same_bits(left, right)


@pytest.mark.parametrize("place", places(*LAYER_OPERATORS, dtypes=(torch.float64,)))
def test_float64_is_left_alone_as_in_torch(place):
    layer = random_sparse_layer((4,), dtype=torch.float64, device=place.device)
    with peft_kernels.use_backend(place.backend):
        with torch.autocast(place.device, torch.bfloat16):
            y = layer()
        assert_same_bits(y, layer())


@PLACES
def test_a_weight_gathered_anew_has_been_cast_with_its_delta(place):
    # What FSDP's layers pass; the cast copy is no longer what is gathered, so backward leaves it as it is.
    layer = random_sparse_layer((4,), device=place.device).training("x", "values")
    original = layer.weight.view(-1)[layer.indices.long()]
    with peft_kernels.use_backend(place.backend), torch.autocast(place.device, torch.bfloat16):
        expected = results(layer)
        actual = results(layer, original=original)
    for name, tensor in actual.items():
        assert_same_bits(tensor, expected[name], name)


@pytest.mark.parametrize("merged", [False, True])
def test_a_module_sees_the_step_between_two_regions(merged):
    layer, original = random_module()
    x = torch.randn(3, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        layer.values.mul_(3.0)
        if merged:
            layer.merge()
        after = layer(x)
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert not torch.equal(before, after)
    assert_same_bits(after, expected)
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)
