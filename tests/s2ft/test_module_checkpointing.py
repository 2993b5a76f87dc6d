"""Activation checkpointing of modules, reentrant and not: gradients are those without it, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import peft_kernels as pk
from peft_kernels.nn import SwiGLUMLP
from peft_kernels.optim import SparseAdamW

from ..support.accuracy import assert_same_bits
from ..support.s2ft_module import random_s2ft_module

EACH_KIND = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])


def stack(dtype):
    layers = [random_s2ft_module(dim, dtype, 16, 16, 4, seed)[0] for seed, dim in enumerate(("input", "output"))]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh())


def loss_and_gradients(run, model, x):
    model.zero_grad()
    x.grad = None
    y = run(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(model[place].trainable.grad for place in (0, 2))]


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
@pytest.mark.parametrize(
    "kind", [SparseAdamW, lambda p, lr: torch.optim.AdamW(p, lr, fused=True)], ids=["ours", "fused"]
)
@pytest.mark.parametrize("parts", [1, 2], ids=["whole batches", "accumulated"])
def test_training_takes_the_same_steps(use_reentrant, kind, parts):
    def trained(run):
        model, x = stack(torch.float32), torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        optimizer = kind([model[0].trainable, model[2].trainable], lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            for part in x.chunk(parts):
                run(model, part).square().sum().backward()
            optimizer.step()
        return model

    plain = trained(lambda model, x: model(x))
    checkpointed = trained(lambda model, x: checkpoint(model, x, use_reentrant=use_reentrant))
    before = stack(torch.float32)
    for place in (0, 2):
        assert_same_bits(checkpointed[place].trainable.detach(), plain[place].trainable.detach())
        assert not torch.equal(plain[place].trainable, before[place].trainable)


@EACH_KIND
@pytest.mark.parametrize("co_permute", [False, True])
def test_checkpointing_through_transformers_keeps_the_gradients(llama, tokens, disturb, use_reentrant, co_permute):
    def gradients(checkpointing):
        model = llama()
        model.enable_input_require_grads()  # as reentrant checkpointing needs it; gradients add up in another order
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        ratios = {"q": 0.25, "o": 0.5, "gate": 0.1, "down": 0.1}
        pk.inject(model, pk.S2FTConfig(ratios=ratios, budget="per_layer", co_permute=co_permute), seed=1)
        assert sum(isinstance(module, SwiGLUMLP) for module in model.modules()) == 2
        disturb(model)
        model.train()
        for part in tokens:  # gradients accumulate
            model(input_ids=part[None], labels=part[None]).loss.backward()
        return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == 8
    for name, value in plain.items():
        assert_same_bits(checkpointed[name], value, name)
