"""Activation checkpointing, reentrant and not: gradients are those without it, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from ..support.accuracy import assert_same_bits
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
