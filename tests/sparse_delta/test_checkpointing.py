"""Activation checkpointing, reentrant and not: gradients are those without it, to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from peft_kernels import ops

from ..support.accuracy import assert_same_bits
from ..support.sparse_delta import random_delta
from ..support.sparse_layer import random_module

EACH_KIND = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])


def stack(dtype):
    first, _ = random_module(16, 16, 30, dtype, seed=1)
    second, _ = random_module(16, 16, 30, dtype, seed=2)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh())


def loss_and_gradients(run, model, x):
    model.zero_grad()
    x.grad = None
    y = run(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(model[place].values.grad for place in (0, 2))]


@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_without_checkpointing(use_reentrant, dtype, autocast):
    model, x = stack(dtype), torch.randn(3, 6, 16).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = loss_and_gradients(model, model, x)
        whole = loss_and_gradients(lambda x: checkpoint(model, x, use_reentrant=use_reentrant), model, x)
        parts = loss_and_gradients(lambda x: checkpoint_sequential(model, 2, x, use_reentrant=use_reentrant), model, x)
    for plain, *others in zip(expected, whole, parts, strict=True):
        for other in others:
            assert_same_bits(other, plain)


@EACH_KIND
def test_training_takes_the_same_steps(use_reentrant):
    def trained(run):
        model, x = stack(torch.float32), torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        optimizer = torch.optim.SGD([model[0].values, model[2].values], lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            run(model, x).square().sum().backward()
            optimizer.step()
        return model

    plain = trained(lambda model, x: model(x))
    checkpointed = trained(lambda model, x: checkpoint(model, x, use_reentrant=use_reentrant))
    for place in (0, 2):
        assert_same_bits(checkpointed[place].values.detach(), plain[place].values.detach())


def test_one_observation_for_each_backward_pass():
    model, x = stack(torch.float32), torch.randn(5, 16, requires_grad=True)
    seen = []
    model[0].gradient_observer = lambda dy, x: seen.append(dy.shape)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert seen == [(5, 16)]


@pytest.mark.parametrize("rewrite", [False, True])
def test_second_derivatives_of_a_layer(rewrite):
    delta = random_delta((9, 13), 31, dtype=torch.float64, values_dtype=torch.float64)
    weight, indices, values = delta.weight, delta.indices, delta.values.requires_grad_()
    with torch.no_grad():
        weight.view(-1)[indices.long()] = delta.original + values
    original = delta.original if rewrite else None
    _assert_second_derivatives(
        lambda x: ops.sparse_delta_linear(x, weight, None, values, indices, original=original), values
    )


def test_second_derivatives_of_an_attached_delta():
    delta = random_delta((9, 13), 31, dtype=torch.float64, values_dtype=torch.float64)
    values = delta.values.requires_grad_()
    _assert_second_derivatives(lambda x: ops.attach_delta(F.linear(x, delta.weight), x, values, delta.indices), values)


def _assert_second_derivatives(layer, values):
    """Under checkpointing that is not reentrant (the other kind refuses them) as without it."""
    x = torch.randn(5, 13, dtype=torch.float64).requires_grad_()
    results = []
    for y in (layer(x), checkpoint(layer, x, use_reentrant=False)):
        first = torch.autograd.grad(y.pow(3).sum(), (x, values), create_graph=True)
        results.append(torch.autograd.grad(sum(each.square().sum() for each in first), (x, values)))
    for left, right in zip(*results, strict=True):
        assert_same_bits(left, right)
