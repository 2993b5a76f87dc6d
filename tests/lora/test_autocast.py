"""`lora_linear` under autocast: activations and weight in the autocast dtype, factors and gradients in their own."""

from __future__ import annotations

import pytest
import torch

import peft_kernels

from ..support.accuracy import assert_same_bits
from ..support.lora import TENSORS, gradients, random_layer, seeded_call
from ..support.places import LAYER_OPERATORS, places

PLACES = pytest.mark.parametrize("place", places(*LAYER_OPERATORS, dtypes=(torch.bfloat16,)))
HALF = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])


@PLACES
@HALF
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_equals_the_explicit_cast(place, half, dropout_p):
    layer = random_layer((3, 5), device=place.device).training(*TENSORS)
    explicit = layer.map(lambda t: t if t is layer.lora_a or t is layer.lora_b else t.detach().to(half))
    explicit = explicit.training(*TENSORS)
    with peft_kernels.use_backend(place.backend):
        with torch.autocast(place.device, half):
            y = seeded_call(layer, dropout_p)
        expected = seeded_call(explicit, dropout_p)
    assert y.dtype == half
    assert_same_bits(y.detach(), expected.detach())
    grad_out = torch.randn_like(y)
    actual, wanted = gradients(y, grad_out, layer), gradients(expected, grad_out, explicit)
    for name in TENSORS:
        assert actual[name].dtype == torch.float32, name
        assert_same_bits(actual[name], wanted[name].float(), name)


@PLACES
@HALF
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_of_any_dtype_meet_in_the_autocast_dtype(place, half, dtype):
    layer = random_layer((4,), dtype=dtype, factor_dtype=torch.float32, device=place.device)
    mixed = layer.map(lambda t: t.float() if t is layer.weight else t).training(*TENSORS)
    with peft_kernels.use_backend(place.backend), torch.autocast(place.device, half):
        y = mixed()
    assert y.dtype == half
    for name, gradient in gradients(y, torch.ones_like(y), mixed).items():
        assert gradient.dtype == getattr(mixed, name).dtype, name


@PLACES
def test_disabled_inside_means_full_precision(place):
    layer = random_layer((4,), device=place.device)
    with peft_kernels.use_backend(place.backend):
        with torch.autocast(place.device, torch.bfloat16), torch.autocast(place.device, enabled=False):
            inside = layer()
        assert_same_bits(inside, layer())
    assert inside.dtype == torch.float32


@PLACES
def test_backward_outside_and_inside_the_context_are_the_same(place):
    layer = random_layer((4,), device=place.device).training(*TENSORS)
    grad_out = torch.randn(4, 20, device=place.device).bfloat16()
    with peft_kernels.use_backend(place.backend):
        with torch.autocast(place.device, torch.bfloat16):
            inside = gradients(layer(), grad_out, layer)
            y = layer()
        outside = gradients(y, grad_out, layer)
    for name in TENSORS:
        assert_same_bits(outside[name], inside[name], name)


@pytest.mark.parametrize("place", places(*LAYER_OPERATORS, dtypes=(torch.float64,)))
def test_float64_is_left_alone_as_in_torch(place):
    layer = random_layer((4,), dtype=torch.float64, device=place.device)
    with peft_kernels.use_backend(place.backend):
        with torch.autocast(place.device, torch.bfloat16):
            y = layer()
        assert_same_bits(y, layer())
    assert y.dtype == torch.float64


@PLACES
def test_autocast_of_another_device_type_changes_nothing(place):
    layer = random_layer((4,), device=place.device)
    other = "cuda" if place.device == "cpu" else "cpu"
    if other == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a second device type")
    with peft_kernels.use_backend(place.backend), torch.autocast(other, torch.bfloat16):
        assert layer().dtype == torch.float32


@PLACES
def test_cache_of_autocast_does_not_hold_stale_weights(place):
    # As in training: the optimizer changes a weight between two autocast regions.
    layer = random_layer((4,), device=place.device).training("weight", "lora_a", "lora_b")
    with peft_kernels.use_backend(place.backend):
        with torch.autocast(place.device, torch.bfloat16):
            before = layer().detach()
        with torch.no_grad():
            layer.weight.mul_(3.0)
            layer.lora_b.mul_(3.0)
        with torch.autocast(place.device, torch.bfloat16):
            after = layer().detach()
    assert not torch.equal(before, after)
