"""Adapter files of SHiRA and Super-Tuning: PEFT's own, from accelerated models and into them."""

from __future__ import annotations

import copy
import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import peft_kernels as pk

from .peft_models import (
    EACH_KIND,
    adapted,
    assert_same_state,
    config_of,
    layer_of,
    llama,
    peft,
    small,
    sparse,
    tokens,
    twins,
    values_of,
)

WEIGHTS = "adapter_model.safetensors"


@EACH_KIND
@pytest.mark.parametrize("save", ["PEFT", "ours"])
def test_what_an_accelerated_model_saves_is_what_peft_loads(kind, save, tmp_path):
    model, twin, _ = twins(adapted(kind))
    ids = tokens()
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(3):
        twin(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = twin(ids).logits
    assert not torch.allclose(expected, model(ids).logits, atol=1e-4), "nothing was learned"
    if save == "PEFT":
        twin.save_pretrained(str(tmp_path))
    else:
        pk.save_adapter(twin, tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path))
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert len(pk.accelerate(loaded).fused) == 10
    assert torch.equal(loaded(ids).logits, expected)
    assert_same_state(loaded, twin)


@EACH_KIND
def test_the_file_is_the_one_peft_writes(kind, tmp_path):
    model, twin, _ = twins(adapted(kind))
    twin(tokens())
    model.save_pretrained(str(tmp_path / "theirs"))
    pk.save_adapter(twin, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])  # a set in PEFT's configuration, in no order
    assert configs[0] == configs[1]


@EACH_KIND
def test_loading_into_an_accelerated_model(kind, tmp_path):
    other = adapted(kind)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.mul_(-2.0)
    for module in other.modules():  # other positions too
        if hasattr(module, "shira_indices"):
            module.shira_indices["default"] = module.shira_indices["default"].flip(1)
        elif hasattr(module, "supertuning_indices"):
            indices = module.supertuning_indices["default"]
            indices.copy_(torch.randperm(module.base_layer.weight.numel())[: len(indices)])
    pk.save_adapter(other, tmp_path)
    _, twin, _ = twins(adapted(kind))
    twin(tokens())
    assert pk.load_adapter(twin, tmp_path) is None
    torch.testing.assert_close(twin(tokens()).logits, other(tokens()).logits, rtol=1e-5, atol=1e-5)
    assert len(pk.accelerate(twin).fused) == 10
    assert_same_state(other, twin)
    twin.load_adapter(str(tmp_path), "again")
    twin.set_adapter("again")
    torch.testing.assert_close(twin(tokens()).logits, other(tokens()).logits, rtol=1e-5, atol=1e-5)


def saved(kind, tmp_path, change):
    """A file of a small model with a change made to its tensors, and another such model."""
    model = small(kind)
    pk.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if key.endswith("_indices"))
    change(tensors, key)
    save_file(tensors, tmp_path / WEIGHTS)
    with torch.no_grad():
        values_of(layer_of(model)).add_(1.0)
    return model


def out_of_range(tensors, key):
    tensors[key].view(-1)[-1] = 1000


def negative(tensors, key):
    tensors[key].view(-1)[-1] = -1


def repeated(tensors, key):
    tensors[key][..., 1] = tensors[key][..., 0]


def missing(tensors, key):
    del tensors[key]


def short(tensors, key):
    tensors[key] = tensors[key][..., 1:].contiguous()


def not_finite(tensors, key):
    values = key.replace("shira_indices", "shira_weight").replace("_indices", "_values")
    tensors[values][0] = float("nan")


@EACH_KIND
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (out_of_range, "does not fit the model: its indices (must be in|are not all inside)"),
        (negative, "does not fit the model: its indices (must be in|are not all inside)"),
        (repeated, "does not fit the model: its indices must be unique"),
        (missing, "missing"),
        (short, "must be"),
        (not_finite, "NaN or infinity"),
    ],
)
@pytest.mark.parametrize("accelerated", [True, False])
def test_a_file_that_does_not_fit_changes_nothing(kind, change, message, accelerated, tmp_path):
    model = saved(kind, tmp_path, change)
    if accelerated:
        pk.accelerate(model)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        pk.load_adapter(model, tmp_path)
    assert_same_state(before, model)


def test_the_scaling_must_be_the_file_s(tmp_path):
    model = saved("shira", tmp_path, lambda tensors, key: None)
    layer_of(model).set_scale("default", 0.5)
    with pytest.raises(ValueError, match=r"scales 0 by 1, the model by 0\.5"):
        pk.load_adapter(model, tmp_path)
    if sparse.SupertuningLinear is None:
        return
    model = saved("supra", tmp_path / "supra", lambda tensors, key: None)
    layer_of(model).supertuning_lora_alpha["default"] = 2.0
    with pytest.raises(ValueError, match=r"scales the factors of 0 by 1\.66667, the model by 0\.666667"):
        pk.load_adapter(model, tmp_path / "supra")
    path = tmp_path / "supra" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": "two"}))
    with pytest.raises(ValueError, match=r"lora_alpha in .* must be a number, got 'two'"):
        pk.load_adapter(model, tmp_path / "supra")


@EACH_KIND
def test_a_file_of_another_method_is_refused(kind, tmp_path):
    lora = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(11, 7)), peft.LoraConfig(r=2, target_modules=["0"]))
    pk.save_adapter(lora, tmp_path / "lora")
    model = small(kind)
    with pytest.raises(ValueError, match=re.escape("is of type 'LORA', the model's of '")):
        pk.load_adapter(model, tmp_path / "lora")
    pk.save_adapter(model, tmp_path / "sparse")
    with pytest.raises(ValueError, match="the model's of 'LORA'"):
        pk.load_adapter(lora, tmp_path / "sparse")


@EACH_KIND
def test_inject_refuses_a_model_with_such_adapters(kind):
    with pytest.raises(ValueError, match=r"model has PEFT adapters already .*use accelerate"):
        pk.inject(small(kind), pk.LoraConfig(target_modules=["0"]))


@pytest.mark.skipif(sparse.SupertuningLinear is None, reason="this PEFT has no Super-Tuning")
def test_indices_that_are_not_saved_are_found_again(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = peft.get_peft_model(llama(), config_of("super", save_precomputed_indices=False))
        pk.accelerate(model)
        expected = model(tokens()).logits
        pk.save_adapter(model, tmp_path)
        assert not any("indices" in key for key in load_file(tmp_path / WEIGHTS))
        loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path))
        pk.load_adapter(model, tmp_path)
    pk.accelerate(loaded)
    assert torch.equal(loaded(tokens()).logits, expected) and torch.equal(model(tokens()).logits, expected)
