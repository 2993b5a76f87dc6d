"""`s2ft_linear` under autocast: activations and weight in the autocast dtype, trainable in its own."""

from __future__ import annotations

import pytest
import torch

import peft_kernels

from ..support.accuracy import assert_same_bits
from ..support.places import places
from ..support.s2ft_layer import KINDS, LAYER_OPERATORS, TENSORS, random_s2ft_layer, results

PLACES = pytest.mark.parametrize("place", places(*LAYER_OPERATORS, dtypes=(torch.bfloat16,)))
KIND = pytest.mark.parametrize("kind", KINDS)


@PLACES
@KIND
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_explicit_cast(place, kind, half, dtype):
    layer = random_s2ft_layer(kind, (3, 5), dtype=dtype, device=place.device).training(*TENSORS)
    explicit = layer.map(lambda t: t if t is layer.trainable else t.detach().to(half)).training(*TENSORS)
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
def test_a_slice_in_another_dtype_is_cast_along(place):
    layer = random_s2ft_layer("input", (3, 5), device=place.device).training(*TENSORS)
    with peft_kernels.use_backend(place.backend), torch.autocast(place.device, torch.bfloat16):
        expected = results(layer)
        actual = results(layer, x_slice=layer.x.detach()[..., layer.indices])
    for name, tensor in actual.items():
        assert_same_bits(tensor, expected[name], name)


@PLACES
@KIND
def test_disabled_inside_means_full_precision(place, kind):
    layer = random_s2ft_layer(kind, (4,), device=place.device)
    with peft_kernels.use_backend(place.backend):
        with torch.autocast(place.device, torch.bfloat16), torch.autocast(place.device, enabled=False):
            inside = layer()
        assert_same_bits(inside, layer())


@PLACES
@KIND
def test_backward_outside_and_inside_the_context_are_the_same(place, kind):
    layer = random_s2ft_layer(kind, (4,), device=place.device).training(*TENSORS)
    wanted = list(layer.tensors().values())
    with peft_kernels.use_backend(place.backend):
        with torch.autocast(place.device, torch.bfloat16):
            y = layer()
            inside = torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=True)
        outside = torch.autograd.grad(y, wanted, torch.ones_like(y))
    for left, right in zip(outside, inside, strict=True):
        assert_same_bits(left, right)


@pytest.mark.parametrize("place", places(*LAYER_OPERATORS, dtypes=(torch.float64,)))
@KIND
def test_float64_is_left_alone_as_in_torch(place, kind):
    layer = random_s2ft_layer(kind, (4,), dtype=torch.float64, device=place.device)
    with peft_kernels.use_backend(place.backend):
        with torch.autocast(place.device, torch.bfloat16):
            y = layer()
        assert_same_bits(y, layer())


@PLACES
@KIND
def test_a_weight_gathered_anew_has_been_cast_with_its_slice(place, kind):
    # What FSDP's layers pass; the cast copy is no longer what is gathered, so backward leaves it as it is.
    layer = random_s2ft_layer(kind, (4,), device=place.device).training("x", "trainable")
    with peft_kernels.use_backend(place.backend), torch.autocast(place.device, torch.bfloat16):
        expected = results(layer)
        actual = results(layer, rewrite=True)
    for name, tensor in actual.items():
        assert_same_bits(tensor, expected[name], name)
