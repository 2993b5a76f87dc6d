"""Activation checkpointing, reentrant and not: gradients are those without it, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from peft_kernels import ops

from ..support.accuracy import assert_same_bits
from ..support.s2ft_layer import random_s2ft_layer


def block(x, layers):
    """A layer whose outputs train, SwiGLU, and one whose inputs do, with and without the columns from SwiGLU."""
    up, down, last = layers
    gate = replace(up, x=x)()
    h, x_slice = ops.swiglu_s2ft(gate, gate.tanh(), down.indices)
    return replace(last, x=replace(down, x=h)(x_slice=x_slice))()


def loss_and_gradients(run, x, layers):
    tensors = [x, *(layer.trainable for layer in layers)]
    for tensor in tensors:
        tensor.grad = None
    y = run(x)
    y.float().square().sum().backward()
    return [y.detach(), *(tensor.grad for tensor in tensors)]


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_without_checkpointing(use_reentrant, dtype, autocast):
    layers = [
        random_s2ft_layer(dim, (), 16, 16, 4, dtype, seed=seed).training("trainable")
        for seed, dim in enumerate(("output", "input", "input"))
    ]
    x = torch.randn(3, 6, 16).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = loss_and_gradients(lambda x: block(x, layers), x, layers)
        found = loss_and_gradients(lambda x: checkpoint(block, x, layers, use_reentrant=use_reentrant), x, layers)
    for actual, plain in zip(found, expected, strict=True):
        assert_same_bits(actual, plain)


def test_a_checkpointed_layer_can_be_differentiated_twice():
    layer = random_s2ft_layer("input", (3,), 6, 5, 2, torch.float64).training("x", "trainable")
    wanted = [layer.x, layer.trainable]

    def second(y):
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), wanted)

    found = second(checkpoint(lambda x: replace(layer, x=x)(), layer.x, use_reentrant=False))
    for actual, expected in zip(found, second(layer()), strict=True):
        torch.testing.assert_close(actual, expected)
