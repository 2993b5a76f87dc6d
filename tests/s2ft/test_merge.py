"""Merging one layer and a whole model: the same function, no gradient for the slice, undone to the bit."""

from __future__ import annotations

import copy

import pytest
import torch

import peft_kernels as pk
from peft_kernels.optim import SparseAdamW

from ..support.accuracy import assert_same_bits
from ..support.s2ft_layer import KINDS
from ..support.s2ft_module import plain_layer, random_s2ft_module, weight_with_slice

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KIND = pytest.mark.parametrize("kind", KINDS)


@KIND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("written", [False, True])
def test_a_merged_layer_computes_the_same_bits_and_unmerges_to_the_bit(kind, dtype, written):
    layer, original = random_s2ft_module(kind, dtype)
    parameter, x = layer.weight, torch.randn(5, 24).to(dtype)
    expected = copy.deepcopy(layer)(x)
    if written:
        layer(x)
    for _ in range(3):
        layer.merge()
        assert layer.merged
        assert_same_bits(layer(x).detach(), expected.detach())
        layer.unmerge()
        assert layer.weight is parameter and not layer.merged
        assert_same_bits(layer.weight.detach(), original)
    assert_same_bits(layer(x).detach(), expected.detach())


@KIND
def test_merging_twice_and_unmerging_twice_warn_and_change_nothing(kind):
    layer, original = random_s2ft_module(kind)
    with pytest.warns(UserWarning, match="not merged; nothing to do"):
        layer.unmerge()
    layer.merge()
    with pytest.warns(UserWarning, match="merged already; nothing to do"):
        layer.merge()
    assert_same_bits(layer.weight.detach(), weight_with_slice(layer, original))


@KIND
def test_a_merged_layer_passes_gradients_to_its_input_and_bias_only(kind):
    layer, _ = random_s2ft_module(kind)
    layer.bias.requires_grad_(True)
    layer.merge()
    x = torch.randn(3, 24, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.bias.grad is not None and layer.trainable.grad is None


@KIND
def test_a_step_on_a_merged_layer_does_not_touch_its_weight(kind):
    layer, original = random_s2ft_module(kind)
    layer(torch.ones(24)).sum().backward()
    layer.merge()
    merged, before = layer.weight.detach().clone(), layer.trainable.detach().clone()
    SparseAdamW([layer.trainable], lr=0.1).step()
    assert not torch.equal(layer.trainable, before)
    layer(torch.ones(24))
    assert_same_bits(layer.weight.detach(), merged)
    layer.unmerge()
    assert_same_bits(layer.weight.detach(), original)
    layer(torch.ones(24))
    assert_same_bits(layer.weight.detach(), weight_with_slice(layer, original))


@KIND
def test_loading_into_a_merged_layer_merges_anew(kind):
    layer, _ = random_s2ft_module(kind, seed=1)
    other, original = random_s2ft_module(kind, seed=2)
    layer.merge()
    layer.load_state_dict(other.state_dict())
    assert layer.merged
    assert_same_bits(layer(torch.eye(24)).detach(), other(torch.eye(24)).detach())
    layer.unmerge()
    assert_same_bits(layer.weight.detach(), original)


@KIND
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_to_linear_gives_a_plain_layer_with_the_same_parameters(kind, merged, merge):
    layer, original = random_s2ft_module(kind)
    layer.eval()
    layer.note = "kept"
    if merged:
        layer.merge()
    linear = layer.to_linear(merge=merge)
    plain = plain_layer(layer.transposed)
    assert type(linear) is type(plain) and linear.weight is layer.weight and linear.bias is layer.bias
    assert not linear.training and linear.note == "kept" and list(linear.state_dict()) == ["weight", "bias"]
    assert set(linear.__dict__) == set(plain.__dict__) | {"note"}
    assert_same_bits(linear.weight.detach(), weight_with_slice(layer, original) if merge else original)


@pytest.mark.parametrize("co_permute", [False, True])
def test_a_model_merges_and_unmerges_all_its_layers(llama, tokens, disturb, co_permute):
    model = llama(dtype=torch.bfloat16)
    config = pk.S2FTConfig(ratios={"q": 0.25, "v": 0.5, "o": 0.25, "up": 0.1, "down": 0.1}, co_permute=co_permute)
    pk.inject(model, config, seed=1)
    permuted = {name: value.clone() for name, value in model.state_dict().items()}
    disturb(model)
    model.eval()
    with torch.no_grad():
        adapted = model(tokens).logits
        pk.merge(model)
        assert torch.equal(model(tokens).logits, adapted)
        with pytest.warns(UserWarning, match="all adapters are merged already"):
            pk.merge(model)
        pk.unmerge(model)
        for name, value in model.state_dict().items():
            assert name.endswith("trainable") or torch.equal(value, permuted[name]), name
        assert torch.equal(model(tokens).logits, adapted)
        with pytest.warns(UserWarning, match="no adapter is merged"):
            pk.unmerge(model)
        base = llama(dtype=torch.bfloat16).eval()(tokens).logits
    assert (adapted - base).float().norm() > 0.1 * base.float().norm()
