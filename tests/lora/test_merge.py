"""Merging one layer and a whole model: rounded once, undone to the bit, kept by copies, never saved."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.nn import LoRALinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def layer_with_update(dtype=torch.float32):
    return LoRALinear(24, 20, r=4, lora_alpha=7, init_lora_weights=False, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerge_restores_bits(dtype):
    layer = layer_with_update(dtype)
    before = layer.weight.clone()
    parameter = layer.weight
    for _ in range(3):
        layer.merge()
        layer.unmerge()
    assert layer.weight is parameter and torch.equal(layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_rounds_each_element_once(dtype):
    layer = layer_with_update(dtype)
    layer.merge()
    update = layer.scaling * (layer.lora_b.double() @ layer.lora_a.double())
    exact = layer.weight.double() + update
    nearest = exact.to(dtype)
    error = (layer.merged_weight.double() - exact).abs()
    # Sums in float32 may tip a tie in the last place; nothing can be further off than the nearest number by that.
    assert (error <= (nearest.double() - exact).abs() + 1e-5).all()
    assert (layer.merged_weight == nearest).float().mean() > 0.95


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merged_layer_computes_the_same_function(dtype):
    layer = layer_with_update(dtype).eval()
    x = torch.randn(5, 24, dtype=dtype)
    before = layer(x)
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer(x), before, **tolerance(dtype))


def tolerance(dtype):
    return {"rtol": 4 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}


def test_merging_twice_and_unmerging_twice_warn_and_change_nothing():
    layer = layer_with_update()
    with pytest.warns(UserWarning, match="not merged; nothing to do"):
        layer.unmerge()
    layer.merge()
    merged = layer.merged_weight
    with pytest.warns(UserWarning, match="merged already; nothing to do"):
        layer.merge()
    assert layer.merged_weight is merged


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_of_a_merged_layer_are_merged_and_unmerge_to_the_bit(copied):
    layer = layer_with_update(torch.bfloat16)
    original = layer.weight.clone()
    layer.merge()
    twin = copied(layer)
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    assert twin.merged and torch.equal(twin(x), layer(x))
    twin.unmerge()
    assert torch.equal(twin.weight, original) and layer.merged


def test_the_state_dict_of_a_merged_layer_is_the_unmerged_one():
    layer = layer_with_update()
    before = copy.deepcopy(layer.state_dict())
    layer.merge()
    after = layer.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def test_loading_into_a_merged_layer_merges_anew():
    layer, other = layer_with_update(), layer_with_update()
    layer.merge()
    layer.load_state_dict(other.state_dict())
    other.merge()
    assert layer.merged and torch.equal(layer.merged_weight, other.merged_weight)


def test_merging_does_not_touch_a_tied_weight():
    embedding = nn.Embedding(20, 24)
    linear = nn.Linear(24, 20, bias=False)
    linear.weight = embedding.weight
    layer = LoRALinear.from_linear(linear, init_lora_weights=False)
    before = embedding.weight.clone()
    layer.merge()
    assert torch.equal(embedding.weight, before) and layer.weight is embedding.weight


def test_a_merged_layer_passes_gradients_to_its_input_and_bias_only():
    layer = layer_with_update()
    layer.bias.requires_grad_(True)
    layer.merge()
    x = torch.randn(3, 24, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.bias.grad is not None and layer.lora_a.grad is None


def test_to_linear_without_merging_gives_the_original_parameters():
    layer = layer_with_update().eval()
    layer.merge()
    linear = layer.to_linear(merge=False)
    assert type(linear) is nn.Linear and linear.weight is layer.weight and linear.bias is layer.bias
    assert not linear.training and list(linear.state_dict()) == ["weight", "bias"]
    assert set(linear.__dict__) == set(nn.Linear(2, 2).__dict__)


@pytest.mark.parametrize("merged_before", [False, True])
def test_to_linear_with_merging_computes_the_merged_function(merged_before):
    layer = layer_with_update()
    if merged_before:
        layer.merge()
    linear = layer.to_linear(merge=True)
    if not merged_before:
        layer.merge()
    x = torch.randn(3, 24)
    assert torch.equal(linear(x), layer(x)) and linear.weight is not layer.weight


def test_a_model_merges_and_unmerges_all_its_layers(llama, tokens, randomize):
    model = llama(dtype=torch.bfloat16)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    pk.inject(model, pk.LoraConfig(r=4))
    randomize(model)
    model.eval()
    with torch.no_grad():
        adapted = model(tokens).logits
        pk.merge(model)
        merged = model(tokens).logits
        pk.unmerge(model)
        assert torch.equal(model(tokens).logits, adapted)
        base = llama(dtype=torch.bfloat16).eval()(tokens).logits
    effect = (adapted - base).float().norm()
    assert effect > 0.1 and (merged - adapted).float().norm() < 0.05 * effect
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_a_model_without_our_layers_says_so(llama):
    for call in (pk.merge, pk.unmerge, pk.eject):
        with pytest.raises(ValueError, match="model has no LoRALinear, SparseDeltaLinear, S2FTLinear or S2FTConv1D"):
            call(llama())
