"""Activation checkpointing, reentrant and not: the recomputed forward applies the mask of the first one."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import peft_kernels
from peft_kernels import ops

from ..support.accuracy import assert_same_bits
from ..support.lora import random_layer
from ..support.places import LAYER_OPERATORS, places

EACH_BACKEND = pytest.mark.parametrize("place", places(*LAYER_OPERATORS))
EACH_KIND = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
P = 0.4


def two_layers(place, dtype=torch.float32):
    """Two layers of equal width, their leaves, and the input."""
    first = random_layer((3, 6), 16, 16, 4, dtype, torch.float32, device=place.device, seed=1)
    second = random_layer((3, 6), 16, 16, 4, dtype, torch.float32, device=place.device, seed=2)
    trained = ("lora_a", "lora_b")
    x = first.x.clone().requires_grad_()
    return x, first.training(*trained), second.training(*trained)


def block(layer):
    """One layer as a function of x; the dropout is drawn inside."""

    def forward(x):
        return ops.lora_linear(x, layer.weight, layer.bias, layer.lora_a, layer.lora_b, layer.scaling, P, True).tanh()

    return forward


def loss_and_gradients(run, x, *layers):
    torch.manual_seed(8)
    y = run(x)
    leaves = [x, *(tensor for layer in layers for tensor in (layer.lora_a, layer.lora_b))]
    for leaf in leaves:
        leaf.grad = None
    # Everything between forward and backward may use the generator; the recomputation must not notice.
    torch.rand(7)
    y.float().square().sum().backward()
    return [y.detach(), *(leaf.grad.clone() for leaf in leaves)]


@EACH_BACKEND
@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_without_checkpointing(place, use_reentrant, dtype):
    x, first, second = two_layers(place, dtype)

    def plain(x):
        return block(second)(block(first)(x))

    def checkpointed(x):
        hidden = checkpoint(block(first), x, use_reentrant=use_reentrant)
        return checkpoint(block(second), hidden, use_reentrant=use_reentrant)

    with peft_kernels.use_backend(place.backend):
        expected = loss_and_gradients(plain, x, first, second)
        actual = loss_and_gradients(checkpointed, x, first, second)
    for left, right in zip(actual, expected, strict=True):
        assert_same_bits(left, right)


@EACH_BACKEND
@EACH_KIND
def test_one_checkpoint_over_several_layers(place, use_reentrant):
    x, first, second = two_layers(place)
    blocks = [block(first), block(second), block(first)]

    def plain(x):
        for function in blocks:
            x = function(x)
        return x

    with peft_kernels.use_backend(place.backend):
        expected = loss_and_gradients(plain, x, first, second)
        actual = loss_and_gradients(
            lambda x: checkpoint_sequential(blocks, 1, x, use_reentrant=use_reentrant), x, first, second
        )
        whole = loss_and_gradients(lambda x: checkpoint(plain, x, use_reentrant=use_reentrant), x, first, second)
    for left, middle, right in zip(actual, whole, expected, strict=True):
        assert_same_bits(left, right)
        assert_same_bits(middle, right)


@EACH_BACKEND
@EACH_KIND
def test_backend_of_the_forward_recomputes_too(place, use_reentrant, monkeypatch):
    # The recomputation runs after `use_backend` has been left; what it calls then is the default backend, and masks are
    # the same bits on all backends, so gradients agree to rounding.
    x, first, _ = two_layers(place)
    with peft_kernels.use_backend(place.backend):
        expected = loss_and_gradients(block(first), x, first)
        torch.manual_seed(8)
        y = checkpoint(block(first), x, use_reentrant=use_reentrant)
    for leaf in (x, first.lora_a, first.lora_b):
        leaf.grad = None
    y.square().sum().backward()
    for leaf, gradient in zip((x, first.lora_a, first.lora_b), expected[1:], strict=True):
        # Another mask would differ by the tensor's own scale, another order of sums by rounding at that scale.
        torch.testing.assert_close(leaf.grad, gradient, rtol=0.0, atol=1e-5 * gradient.abs().max().item())
