"""`accelerate` on PEFT models: what runs fused, what is left alone and why, and that PEFT's own calls keep working."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import peft_kernels as pk

from .peft_layer import layer_of, small

peft = pytest.importorskip("peft")
integration = pytest.importorskip("peft_kernels.integrations.peft")
Linear = integration.Linear

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def adapted(llama, randomize):
    """Makes two equal PEFT models, the second accelerated."""

    def make(dtype=torch.float32, wrap=None, **options):
        torch.manual_seed(0)
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": SEVEN, **options})
        model = peft.get_peft_model(llama(dtype=dtype, attention_bias=True), config)
        randomize(model)
        twin = copy.deepcopy(model)
        return model, twin, pk.accelerate(twin)

    return make


def test_every_layer_runs_fused_and_computes_the_same(adapted, tokens, fused_calls):
    model, twin, report = adapted()
    assert str(report).splitlines()[0] == "AccelerationReport: 14 of 14 layers fused" and not report.left_alone
    torch.testing.assert_close(twin(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    assert len(fused_calls) == 14


@pytest.mark.parametrize("target", [["q_proj"], SEVEN])
def test_gradients_are_peft_s(adapted, tokens, target):
    model, twin, _ = adapted(target_modules=target, bias="lora_only", use_rslora=True)
    for each in (model, twin):
        each(input_ids=tokens, labels=tokens).loss.backward()
    theirs, ours = dict(model.named_parameters()), dict(twin.named_parameters())
    assert theirs.keys() == ours.keys()
    for name, parameter in theirs.items():
        assert parameter.requires_grad == ours[name].requires_grad
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_float32_adapters_over_bfloat16_do_not_cast_the_activations(adapted, tokens):
    model, twin, _ = adapted(dtype=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        twin.base_model.model.model.layers[0].mlp.up_proj(torch.ones(24, 32, dtype=torch.bfloat16))
    assert {tensor.shape[1] for tensor in saved if tensor.dtype == torch.float32 and len(tensor) == 24} == {4}
    difference = (model(tokens).logits - twin(tokens).logits).float().norm()
    assert difference < 0.02 * model(tokens).logits.float().norm()


def test_dropout_follows_the_dropout_module():
    model = small(lora_dropout=0.5)
    pk.accelerate(model)
    layer, x = layer_of(model), torch.randn(50, 6)
    torch.manual_seed(0)
    first = layer(x)
    assert not torch.equal(layer(x), first), "a new mask for each call"
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
    layer.lora_dropout["default"].p = 1.0
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    model.eval()
    torch.testing.assert_close(layer(x), Linear.forward(layer, x))


def test_switching_adapters_and_disabling_them(fused_calls):
    model = small()
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False))
    twin = copy.deepcopy(model)
    pk.accelerate(twin)
    x = torch.randn(5, 6)
    for name in ("default", "second"):
        for each in (model, twin):
            each.set_adapter(name)
        torch.testing.assert_close(twin(x), model(x))
    assert len(fused_calls) == 2
    with model.disable_adapter(), twin.disable_adapter():
        assert (
            torch.equal(twin(x), model(x)) and pk.accelerate(twin).left_alone[0].reason == "its adapters are disabled"
        )
    for each in (model, twin):
        each.base_model.set_adapter(["default", "second"])
    assert pk.accelerate(twin).left_alone[0].reason == "2 adapters are active, not one"
    assert torch.equal(twin(x), model(x)) and len(fused_calls) == 2


def test_mixed_batches_go_through_peft(fused_calls):
    model = small()
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    model.eval()
    x, names = torch.randn(3, 6), ["default", "second", "__base__"]
    expected = model(x, adapter_names=names)
    pk.accelerate(model)
    assert torch.equal(model(x, adapter_names=names), expected) and not fused_calls


def test_merging_unmerging_and_unloading(adapted, tokens):
    _, twin, _ = adapted(lora_dropout=0.0)
    twin.eval()
    expected = twin(tokens).logits
    twin.merge_adapter()
    assert {layer.reason for layer in pk.accelerate(twin).layers} == {"an adapter is merged into its weight"}
    torch.testing.assert_close(twin(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    twin.unmerge_adapter()
    torch.testing.assert_close(twin(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    plain = twin.merge_and_unload()
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(plain(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_factor_stays_frozen():
    model = small()
    pk.accelerate(model)
    layer = layer_of(model)
    layer.lora_A["default"].weight.requires_grad_(False)
    model(torch.randn(3, 6)).sum().backward()
    assert layer.lora_A["default"].weight.grad is None and layer.lora_B["default"].weight.grad is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_state_dicts_stay_accelerated_and_peft_s(copied):
    model = small()
    keys = list(model.state_dict())
    pk.accelerate(model)
    twin, x = copied(model), torch.randn(3, 6)
    assert list(twin.state_dict()) == keys and isinstance(layer_of(twin), integration.AcceleratedLinear)
    assert isinstance(layer_of(twin), Linear) and torch.equal(twin(x), model(x))


def test_accelerating_twice_and_restoring(fused_calls):
    model = small()
    assert pk.accelerate(model) == pk.accelerate(model)
    assert pk.restore(model) == 1 and type(layer_of(model)) is Linear and pk.restore(model) == 0
    model(torch.randn(3, 6))
    assert not fused_calls


def test_models_without_peft_layers_are_refused():
    with pytest.raises(ValueError, match="model has no PEFT layers; use inject"):
        pk.accelerate(nn.Sequential(nn.Linear(2, 2)))
    model = nn.Sequential(pk.nn.LoRALinear(4, 4))
    assert pk.accelerate(model).fused[0].path == "0"


def test_another_peft_is_recognized(monkeypatch):
    integration._check_peft.cache_clear()
    monkeypatch.setattr(Linear, "forward", lambda self, x, *args, **kwargs: self.base_layer(x))
    with pytest.raises(integration.PeftIncompatible, match="does not compute what it has computed so far"):
        pk.accelerate(small())
    monkeypatch.setattr(Linear, "forward", lambda self, hidden: hidden)
    with pytest.raises(integration.PeftIncompatible, match="is expected to take"):
        pk.accelerate(small())


def test_compiles_without_a_graph_break():
    model = small()
    pk.accelerate(model)
    x = torch.randn(3, 6)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_regenerates_the_mask(adapted, tokens, reentrant):
    _, model, _ = adapted(lora_dropout=0.3)

    def gradients():
        model.zero_grad()
        torch.manual_seed(1)
        model(input_ids=tokens, labels=tokens).loss.backward()
        return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() and len(plain) == 28
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, msg=name)
