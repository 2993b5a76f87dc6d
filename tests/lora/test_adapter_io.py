"""Adapter directories: both ways with PEFT, equal logits, equal keys, checked before the model is touched, whole."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft_kernels as pk
from peft_kernels import adapter_files
from peft_kernels.nn import LoRALinear

CONFIGS = {
    "plain": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "everything": {"r": 4, "target_modules": "all-linear", "lora_alpha": 10, "use_rslora": True},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {r"layers\.1\.mlp.*": 3},
    },
    "layers": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "regex": {"r": 4, "target_modules": r".*\.0\..*(up|down)_proj"},
    "lora_only bias": {"r": 4, "target_modules": ["q_proj"], "bias": "lora_only"},
    "all biases": {"r": 4, "target_modules": ["q_proj"], "bias": "all"},
    "saved head": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "bias": "all"},
}
EACH_CONFIG = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def base(llama):
    return lambda: llama(attention_bias=True, mlp_bias=True)


def disturb(model):
    """Draws everything that trains anew."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@EACH_CONFIG
def test_peft_loads_ours_with_equal_logits_and_writes_the_same_keys(peft, base, tokens, options, tmp_path):
    model = base()
    pk.inject(model, pk.LoraConfig(**options))
    disturb(model)
    pk.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours"))
    model.eval()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == again.keys() and all(torch.equal(ours[key], again[key]) for key in ours)


@EACH_CONFIG
def test_we_load_peft_s_with_equal_logits(peft, base, tokens, options, tmp_path):
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**options))
    disturb(theirs)
    theirs.save_pretrained(str(tmp_path))
    theirs.eval()
    bare = base()
    report = pk.load_adapter(bare, tmp_path)
    torch.testing.assert_close(bare(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    assert report.trainable_parameters == 0 and not bare.training
    injected = base()
    pk.inject(injected, pk.LoraConfig(**options))
    assert pk.load_adapter(injected, tmp_path) is None
    injected.eval()
    assert torch.equal(injected(tokens).logits, bare(tokens).logits)


def test_a_classifier_with_all_biases_goes_both_ways(peft, tmp_path, tokens):
    transformers = pytest.importorskip("transformers")

    def bert():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
        )
        return transformers.BertForSequenceClassification(config).eval()

    options = {"r": 2, "target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}
    theirs = peft.get_peft_model(bert(), peft.LoraConfig(**options))
    disturb(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = bert()
    pk.load_adapter(ours, tmp_path / "theirs", is_trainable=True)
    assert ours.classifier.bias.requires_grad
    ours.eval()
    torch.testing.assert_close(ours(tokens).logits, theirs.eval()(tokens).logits)
    pk.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(tokens).logits, ours(tokens).logits)


def test_an_accelerated_peft_model_saves_and_loads(peft, base, tokens, tmp_path):
    def fresh():
        model = peft.get_peft_model(base(), peft.LoraConfig(**CONFIGS["all biases"]))
        pk.accelerate(model)
        return model.eval()

    model, other = fresh(), fresh()
    disturb(model)
    pk.save_adapter(model, tmp_path)
    assert pk.load_adapter(other, tmp_path) is None
    assert torch.equal(other(tokens).logits, model(tokens).logits)
    ours = base()
    pk.load_adapter(ours, tmp_path)
    assert torch.equal(ours(tokens).logits, model(tokens).logits)
    scaled = peft.get_peft_model(base(), peft.LoraConfig(**{**CONFIGS["all biases"], "lora_alpha": 99}))
    with pytest.raises(ValueError, match=r"scales .*q_proj by 2, the model by 24.75"):
        pk.load_adapter(scaled, tmp_path)


def test_a_hand_made_model_describes_itself(peft, tmp_path):
    def linears():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))

    def made():
        model = linears()
        for index, (r, lora_alpha) in {0: (2, 4), 2: (3, 5)}.items():
            model[index] = LoRALinear.from_linear(model[index], r, lora_alpha, init_lora_weights=False)
        return model

    model, x = made(), torch.randn(4, 8)
    pk.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(linears(), str(tmp_path))
    torch.testing.assert_close(theirs(x), model(x))
    other = made()
    pk.load_adapter(other, tmp_path)
    assert torch.equal(other(x), model(x))


def test_a_merged_model_saves_the_same_adapter(base, tmp_path):
    model = base()
    pk.inject(model, pk.LoraConfig(**CONFIGS["plain"]))
    disturb(model)
    pk.save_adapter(model, tmp_path / "before")
    pk.merge(model)
    pk.save_adapter(model, tmp_path / "merged")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    with pytest.raises(ValueError, match="model has merged layers; unmerge it"):
        pk.load_adapter(model, tmp_path / "before")


@pytest.fixture
def saved(base, tmp_path):
    """A directory with a plain adapter, and functions that edit its files."""
    model = base()
    pk.inject(model, pk.LoraConfig(**CONFIGS["plain"]))
    disturb(model)
    pk.save_adapter(model, tmp_path)

    class Saved:
        path = tmp_path
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

        def tensors(self, change):
            tensors = load_file(tmp_path / "adapter_model.safetensors")
            change(tensors)
            save_file(tensors, tmp_path / "adapter_model.safetensors")

        def config(self, **values):
            file = tmp_path / "adapter_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return Saved()


def replaced(key, value):
    return lambda saved: saved.tensors(lambda tensors: tensors.__setitem__(key or saved.key, value))


DAMAGE = {
    "missing key": (lambda s: s.tensors(lambda t: t.pop(s.key)), "does not fit the model: .*lora_A.weight missing"),
    "extra key": (replaced("base_model.model.x", torch.zeros(2)), "base_model.model.x unexpected"),
    "shape": (replaced(None, torch.zeros(5, 32)), r"lora_A.weight must be \[4, 32\], got \[5, 32\]"),
    "dtype": (replaced(None, torch.zeros(4, 32, dtype=torch.int32)), "must be like torch.float32, got torch.int32"),
    "NaN": (replaced(None, torch.full((4, 32), float("nan"))), "holds NaN or infinity"),
    "cut file": (lambda s: os.truncate(s.path / "adapter_model.safetensors", 99), "is not a whole safetensors file"),
    "bad JSON": (lambda s: (s.path / "adapter_config.json").write_text("{"), "is not valid JSON"),
    "no weights": (lambda s: (s.path / "adapter_model.safetensors").unlink(), "it has no adapter_model.safetensors"),
    "pickle": (
        lambda s: (s.path / "adapter_model.safetensors").rename(s.path / "adapter_model.bin"),
        "holds its weights as a pickle",
    ),
    "method": (lambda s: s.config(peft_type="IA3"), "peft_type must be one of 'LORA'"),
    "variant": (lambda s: s.config(use_dora=True), "use_dora=True is not supported"),
    "targets": (lambda s: s.config(target_modules=["w1"]), "no layer matches"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_bad_directory_is_named_and_changes_nothing(base, saved, damage, message):
    damage(saved)
    model = base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pk.load_adapter(model, saved.path)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_a_missing_directory_is_named(base, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"directory must be a local adapter directory, but .*nowhere"):
        pk.load_adapter(base(), tmp_path / "nowhere")


def test_another_scaling_is_refused(base, saved):
    model = base()
    pk.inject(model, pk.LoraConfig(**CONFIGS["plain"], lora_alpha=5))
    before = model.state_dict()[saved.key.removeprefix("base_model.model.").replace("lora_A.weight", "lora_a")].clone()
    with pytest.raises(ValueError, match=r"scales .*q_proj by 2 \(lora_alpha=8, r=4, .*\), the model by 1.25"):
        pk.load_adapter(model, saved.path)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.lora_a, before)


def test_another_base_model_is_a_warning(base, saved):
    saved.config(base_model_name_or_path="one")
    model = base()
    model.config._name_or_path = model.name_or_path = "two"
    with pytest.warns(UserWarning, match="the adapter was trained on 'one', this model is 'two'"):
        pk.load_adapter(model, saved.path)


def test_rounding_to_the_model_s_dtype_is_a_warning(llama, saved):
    model = llama(attention_bias=True, mlp_bias=True, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="8 of the adapter's tensors are rounded"):
        pk.load_adapter(model, saved.path, autocast_adapter_dtype=False)


def test_an_interrupted_save_leaves_the_previous_adapter(base, saved, monkeypatch):
    names = ("adapter_model.safetensors", "adapter_config.json")
    before = {name: (saved.path / name).read_bytes() for name in names}
    model = base()
    pk.inject(model, pk.LoraConfig(**CONFIGS["everything"]))

    def full_disk(path):
        raise OSError("no space left on device")

    monkeypatch.setattr(adapter_files, "_sync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        pk.save_adapter(model, saved.path)
    assert {path.name: path.read_bytes() for path in saved.path.iterdir()} == before


def test_a_model_without_adapter_cannot_be_saved(base, tmp_path):
    with pytest.raises(ValueError, match="model has no adapter"):
        pk.save_adapter(base(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
