"""`inject` and `eject`: what is replaced, what trains, what is reported, and that a failed call changes nothing."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.nn import LoRALinear

SEVEN = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def adapted(model):
    return [path for path, module in model.named_modules() if isinstance(module, LoRALinear)]


def trainable(model):
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def fingerprint(model):
    """Everything a failed call might have changed."""
    modules = [(path, type(module), id(module)) for path, module in model.named_modules(remove_duplicate=False)]
    parameters = [(name, id(value), value.requires_grad) for name, value in model.named_parameters()]
    return modules, parameters, set(model.__dict__)


@pytest.mark.parametrize("target", [None, "all-linear"])
def test_all_linear_layers_but_the_output(llama, target):
    model = llama()
    report = pk.inject(model, pk.LoraConfig(r=4, target_modules=target))
    assert len(adapted(model)) == 14 and sorted({path.rpartition(".")[2] for path in adapted(model)}) == SEVEN
    assert [layer.path for layer in report.fused] == adapted(model)
    assert [(layer.path, layer.reason) for layer in report.left_alone] == [
        ("lm_head", "the output layer, which all-linear leaves out")
    ]
    assert trainable(model) == sorted(f"{path}.lora_{factor}" for path in adapted(model) for factor in "ab")


def test_injecting_changes_no_output_and_ejecting_restores_the_model(llama, tokens, randomize):
    model = llama()
    expected, before = model(tokens).logits, fingerprint(model)
    pk.inject(model, pk.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(model(tokens).logits, expected)
    randomize(model)
    assert not torch.allclose(model(tokens).logits, expected, atol=1e-3)
    pk.eject(model, merge=False)
    after = fingerprint(model)
    assert after[1:] == before[1:] and [row[:2] for row in after[0]] == [row[:2] for row in before[0]]
    assert torch.equal(model(tokens).logits, expected)


def test_ejecting_with_merge_keeps_the_update(llama, tokens, randomize):
    model = llama()
    pk.inject(model, pk.LoraConfig(r=4))
    randomize(model)
    expected = model(tokens).logits
    pk.eject(model)
    assert not adapted(model)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_ranks_and_alphas_by_pattern(llama):
    model = llama()
    pk.inject(
        model, pk.LoraConfig(r=4, rank_pattern={"q_proj": 2, r"layers\.1\.mlp.*": 6}, alpha_pattern={"v_proj": 32})
    )
    layer = model.model.layers[1]
    assert (layer.self_attn.q_proj.r, layer.mlp.up_proj.r, layer.self_attn.v_proj.r) == (2, 6, 4)
    assert (layer.self_attn.v_proj.scaling, layer.mlp.up_proj.scaling) == (8.0, 8 / 6)


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("lora_only", 2), ("all", 14)])
def test_biases_train_as_asked(llama, bias, count):
    model = llama(attention_bias=True, mlp_bias=True)
    pk.inject(model, pk.LoraConfig(target_modules=["q_proj"], bias=bias))
    assert sum(name.endswith("bias") for name in trainable(model)) == count


def test_modules_to_save_train_in_full(llama):
    model = llama()
    report = pk.inject(model, pk.LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
    assert "lm_head.weight" in trainable(model)
    assert report.left_alone[0].reason == "modules_to_save trains lm_head in full"


def test_a_saved_module_is_untied_so_that_the_other_one_stays_frozen(llama):
    model = llama(tie_word_embeddings=True)
    shared = model.lm_head.weight
    assert model.model.embed_tokens.weight is shared
    report = pk.inject(model, pk.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert model.model.embed_tokens.weight is shared and not shared.requires_grad
    assert model.lm_head.weight.requires_grad and torch.equal(model.lm_head.weight, shared)
    assert "lm_head.weight was tied to model.embed_tokens.weight" in str(report)


def test_a_tied_layer_can_be_adapted_and_its_tie_survives_until_merged_out(llama, tokens, randomize):
    model = llama(tie_word_embeddings=True)
    pk.inject(model, pk.LoraConfig(target_modules=["lm_head"]))
    randomize(model)
    embedding = model.model.embed_tokens.weight
    assert model.lm_head.weight is embedding
    expected, values = model(tokens).logits, embedding.clone()
    with pytest.warns(UserWarning, match="no longer tied to other modules': lm_head"):
        pk.eject(model, merge=True)
    assert torch.equal(embedding, values) and model.lm_head.weight is not embedding
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_used_at_two_places_stays_one_layer():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": nn.Sequential(shared), "second": nn.Sequential(shared)})
    report = pk.inject(model, pk.LoraConfig(r=2, target_modules="all-linear"))
    assert model["first"][0] is model["second"][0] and isinstance(model["first"][0], LoRALinear)
    assert len(report.layers) == 1
    pk.eject(model)
    assert model["first"][0] is model["second"][0] and type(model["first"][0]) is nn.Linear


def test_all_linear_leaves_special_layers_alone_and_says_why():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), Special(8, 8), nn.TransformerEncoderLayer(8, 2, 16))
    report = pk.inject(model, pk.LoraConfig(r=2, exclude_modules=["nothing"]))
    reasons = {layer.path: layer.reason for layer in report.left_alone}
    assert adapted(model) == ["0"]
    assert "whose own forward would be lost" in reasons["1"]
    assert "NonDynamicallyQuantizableLinear" in reasons["2.self_attn.out_proj"]
    assert reasons["2.linear1"] == "nn.TransformerEncoderLayer reads its weight without calling it"


def test_the_seed_makes_the_adapter(llama):
    first, second = llama(), llama()
    pk.inject(first, pk.LoraConfig(), seed=5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    pk.inject(second, pk.LoraConfig(), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    values = second.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize(("autocast", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_adapter_s_dtype(llama, autocast, expected):
    model = llama(dtype=torch.bfloat16)
    pk.inject(model, pk.LoraConfig(), autocast_adapter_dtype=autocast)
    assert {layer.lora_a.dtype for layer in model.modules() if isinstance(layer, LoRALinear)} == {expected}


def test_inference_mode_freezes_everything(llama):
    model = llama()
    pk.inject(model, pk.LoraConfig(inference_mode=True, bias="all", modules_to_save=["lm_head"]))
    assert trainable(model) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (pk.LoraConfig(target_modules=["w1"]), r"no layer matches target_modules=\['w1'\].*named down_proj.*v_proj"),
        (pk.LoraConfig(target_modules=[]), "no layer matches"),
        (pk.LoraConfig(target_modules=["mlp"]), "layers.0.mlp: it is a .*LlamaMLP, not an nn.Linear"),
        (pk.LoraConfig(target_modules=["embed_tokens"]), "embed_tokens: it is a nn.Embedding, not an nn.Linear"),
        (pk.LoraConfig(modules_to_save=["pooler"]), "modules_to_save names 'pooler', but no module's path ends in it"),
        (pk.LoraConfig(modules_to_save=["layers"]), "modules_to_save cannot hold model.layers, a nn.ModuleList"),
        (pk.LoraConfig(target_modules=["q_proj"], exclude_modules=".*"), "no layer matches .*exclude_modules"),
        ({"r": 8}, "config must be one of LoraConfig, S2FTConfig, SparseDeltaConfig, got dict"),
    ],
)
def test_nothing_is_changed_when_injecting_fails(llama, config, message):
    model = llama()
    before = fingerprint(model)
    with pytest.raises((ValueError, TypeError), match=message):
        pk.inject(model, config)
    assert fingerprint(model) == before


def test_peft_s_own_configuration_is_taken(llama):
    peft = pytest.importorskip("peft")
    model = llama()
    pk.inject(model, peft.LoraConfig(r=3, target_modules=["q_proj"], lora_dropout=0.5))
    assert len(adapted(model)) == 2 and model.model.layers[0].self_attn.q_proj.lora_dropout == 0.5
    with pytest.raises(ValueError, match="use_dora=True is not supported"):
        pk.inject(llama(), peft.LoraConfig(use_dora=True, target_modules=["q_proj"]))


def test_models_that_are_not_ready_are_refused(llama):
    model = llama()
    pk.inject(model, pk.LoraConfig())
    with pytest.raises(ValueError, match="model has adapters already"):
        pk.inject(model, pk.LoraConfig())
    with pytest.raises(ValueError, match=r"wrapped by torch.compile"):
        pk.inject(torch.compile(llama()), pk.LoraConfig())
    with pytest.raises(ValueError, match=r"it is the whole model; use nn.LoRALinear.from_linear"):
        pk.inject(nn.Linear(4, 4), pk.LoraConfig())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_an_injected_model_are_injected(llama, tokens, randomize, copied, tmp_path):
    model = llama()
    pk.inject(model, pk.LoraConfig(r=4))
    randomize(model)
    twin = copied(model)
    assert torch.equal(twin(tokens).logits, model(tokens).logits)
    pk.save_adapter(twin, tmp_path)
    pk.eject(twin, merge=False)
    assert len(adapted(model)) == 14


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_through_transformers_keeps_the_gradients(llama, tokens, randomize, reentrant):
    def gradients(checkpointing):
        model = llama()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        pk.inject(model, pk.LoraConfig(r=4, lora_dropout=0.3))
        randomize(model)
        model.train()
        torch.manual_seed(2)
        model(input_ids=tokens, labels=tokens).loss.backward()
        return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == 28
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, msg=name)


def test_the_report_reads_well(llama, capsys):
    report = pk.inject(llama(), pk.LoraConfig(r=4))
    assert str(report).splitlines()[0] == "InjectionReport: 14 of 15 layers fused"
    assert "lm_head" in str(report) and "note: target_modules is not given" in str(report)
    report.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {report.trainable_parameters:,d} || all params: ")


def test_importing_the_package_imports_neither_peft_nor_transformers():
    code = "import sys, peft_kernels; print([name for name in ('peft', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
