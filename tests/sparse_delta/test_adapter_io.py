"""Adapter directories: both ways with PEFT's Super-Tuning, checked before the model is touched, written whole."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft_kernels as pk
from peft_kernels import SparseDeltaConfig, adapter_files
from peft_kernels.nn import SparseDeltaLinear

CONFIGS = {
    "plain": {"density": 0.1, "target_modules": ["q_proj", "v_proj"]},
    "everything": {"density": 0.03, "target_modules": "all-linear", "selection": "magnitude"},
    "default": {},
    "half": {"density": 0.5, "target_modules": r".*\.0\..*(up|down)_proj"},
    "layers": {"density": 0.1, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "one layer": {"num_deltas": 5, "target_modules": ["model.layers.0.self_attn.q_proj"]},
    "saved head": {"density": 0.1, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
OURS_ONLY = {
    "all biases": {"density": 0.1, "target_modules": ["q_proj"], "bias": "all"},
    "one each": {"density": 1e-9, "target_modules": ["q_proj", "k_proj", "up_proj"]},
    "a full one": {"num_deltas": 10**9, "target_modules": ["q_proj"]},
}
FILES = ("adapter_model.safetensors", "adapter_config.json")


def each(configs):
    return pytest.mark.parametrize("options", configs.values(), ids=configs.keys())


@pytest.fixture
def peft():
    module = pytest.importorskip("peft")
    if not hasattr(module, "SupertuningConfig"):
        pytest.skip("this PEFT has no Super-Tuning")
    return module


@pytest.fixture
def base(llama):
    return lambda: llama(attention_bias=True, mlp_bias=True)


def redraw(model):
    """Draws everything that trains anew."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def made(base, options):
    model = base()
    pk.inject(model, SparseDeltaConfig(**options), seed=3)
    redraw(model)
    return model.eval()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@each({**CONFIGS, **OURS_ONLY})
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(llama, tokens, options, dtype, tmp_path):
    def base():
        return llama(attention_bias=True, mlp_bias=True, dtype=dtype)

    model = made(base, options)
    pk.save_adapter(model, tmp_path)
    expected = model(tokens).logits
    bare = base()
    report = pk.load_adapter(bare, tmp_path)
    assert report.trainable_parameters == 0 and not bare.training
    assert torch.equal(bare(tokens).logits, expected)
    injected = base()
    pk.inject(injected, SparseDeltaConfig(**options), seed=9)  # other positions, which the file's replace
    assert pk.load_adapter(injected, tmp_path) is None
    assert torch.equal(injected.eval()(tokens).logits, expected)
    ours, theirs = model.state_dict(), injected.state_dict()
    for name in ours:
        if not name.endswith("weight"):
            assert torch.equal(ours[name], theirs[name]), name
    pk.save_adapter(bare, tmp_path / "again")
    first, again = (load_file(folder / FILES[0]) for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


@each(CONFIGS)
def test_peft_loads_ours_with_equal_logits_and_writes_the_same_keys(peft, base, tokens, options, tmp_path, recwarn):
    model = made(base, options)
    pk.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours"))
    assert not [warning for warning in recwarn if "adapter" in str(warning.message).lower()]
    torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours, again = (load_file(tmp_path / name / FILES[0]) for name in ("ours", "theirs"))
    assert ours.keys() == again.keys() and all(torch.equal(ours[key], again[key]) for key in ours)


@each(OURS_ONLY)
def test_what_super_tuning_cannot_say_is_written_in_a_format_of_our_own(base, options, tmp_path):
    pk.save_adapter(made(base, options), tmp_path)
    values = json.loads((tmp_path / FILES[1]).read_text())
    if options.get("density") == 1e-9 or options.get("bias") == "all":
        assert values["peft_type"] == "SPARSE_DELTA"
    else:  # every entry of every layer is a share that Super-Tuning knows
        assert values["peft_type"] == "SUPERTUNING" and values["sparsity"] == 0.0


@pytest.mark.parametrize("select_top", [True, False])
def test_we_load_what_peft_made_and_trained(peft, base, tokens, select_top, tmp_path):
    config = peft.SupertuningConfig(sparsity=0.95, target_modules=["q_proj", "down_proj"], select_top=select_top)
    theirs = peft.get_peft_model(base(), config)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(5):
        loss = theirs(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    theirs.save_pretrained(str(tmp_path))
    theirs.eval()
    bare = base()
    pk.load_adapter(bare, tmp_path)
    torch.testing.assert_close(bare(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    injected = base()
    pk.inject(injected, SparseDeltaConfig(density=1 - 0.95, target_modules=["q_proj", "down_proj"]))
    assert pk.load_adapter(injected, tmp_path) is None
    assert torch.equal(injected.eval()(tokens).logits, bare(tokens).logits)
    pk.save_adapter(bare, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_training_goes_as_peft_s_does(peft, base, tokens, tmp_path):
    theirs = peft.get_peft_model(base(), peft.SupertuningConfig(sparsity=0.9, target_modules="all-linear"))
    theirs.save_pretrained(str(tmp_path))
    ours = base()
    pk.load_adapter(ours, tmp_path, is_trainable=True)
    curves = []
    for model, kind in ((theirs, torch.optim.AdamW), (ours, torch.optim.AdamW), (ours, pk.optim.SparseAdamW)):
        if len(curves) == 2:
            pk.load_adapter(ours, tmp_path)
        model.train()
        optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.03)
        curves.append([])
        for _ in range(10):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curves[-1].append(loss.item())
    expected, *found = torch.tensor(curves)
    assert expected[-1] < 0.95 * expected[0]
    for curve in found:
        torch.testing.assert_close(curve, expected, rtol=1e-4, atol=0)


def test_a_trainable_load_trains(base, tmp_path):
    pk.save_adapter(made(base, CONFIGS["plain"]), tmp_path)
    model = base()
    report = pk.load_adapter(model, tmp_path, is_trainable=True)
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    assert all(name.endswith("values") for name, p in model.named_parameters() if p.requires_grad)


def test_a_merged_model_saves_the_same_adapter_and_loads_none(base, tokens, tmp_path):
    model = made(base, CONFIGS["plain"])
    pk.save_adapter(model, tmp_path / "before")
    pk.merge(model)
    pk.save_adapter(model, tmp_path / "merged")
    for name in FILES:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    before = state(model)
    with pytest.raises(ValueError, match="model has merged layers; unmerge it"):
        pk.load_adapter(model, tmp_path / "before")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_hand_made_model_describes_itself(tmp_path):
    def linears():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))

    def hand_made():
        model = linears()
        for index, count in {0: 5, 2: 11}.items():
            model[index] = SparseDeltaLinear.from_linear(model[index], num_deltas=count)
            with torch.no_grad():
                model[index].values.normal_()
        return model

    model, x = hand_made(), torch.randn(4, 8)
    pk.save_adapter(model, tmp_path)
    other = hand_made()
    pk.load_adapter(other, tmp_path)
    assert torch.equal(other(x), model(x))
    bare = linears()
    pk.load_adapter(bare, tmp_path)
    assert [type(layer).__name__ for layer in bare] == ["SparseDeltaLinear", "Linear", "SparseDeltaLinear"]
    assert torch.equal(bare(x), model(x))


@pytest.mark.parametrize("counts", [[0, 0], [0, 3]])
def test_a_layer_without_entries_is_no_super_tuning(tmp_path, counts):
    model = nn.Sequential(*(SparseDeltaLinear(8, 8, num_deltas=count) for count in counts))
    pk.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / FILES[1]).read_text())["peft_type"] == "SPARSE_DELTA"
    bare = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pk.load_adapter(bare, tmp_path)
    assert [layer.num_deltas for layer in bare] == counts


@pytest.fixture
def saved(base, tmp_path):
    """A directory with a plain adapter, and functions that edit its files."""
    pk.save_adapter(made(base, CONFIGS["plain"]), tmp_path)

    class Saved:
        path = tmp_path
        layer = "base_model.model.model.layers.0.self_attn.q_proj"
        values, indices = f"{layer}.supertuning_values", f"{layer}.supertuning_indices"

        def tensors(self, change):
            tensors = load_file(tmp_path / FILES[0])
            change(tensors)
            save_file(tensors, tmp_path / FILES[0])

        def config(self, **values):
            file = tmp_path / FILES[1]
            file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

        def drop(self, *names):
            self.tensors(lambda tensors: [tensors.pop(name) for name in names])

        def put(self, name, value):
            self.tensors(lambda tensors: tensors.__setitem__(name, value))

        def edit(self, name, at, value):
            self.tensors(lambda tensors: tensors[name].__setitem__(at, value))

        def repeat(self):
            self.tensors(lambda tensors: tensors[self.indices].__setitem__(50, int(tensors[self.indices][2])))

    return Saved()


DAMAGE = {
    "no values": (lambda s: s.drop(s.values), "does not fit the model: .*supertuning_values missing"),
    "no indices": (lambda s: s.drop(s.indices), "positions must be given for .*q_proj|supertuning_indices missing"),
    "no layer": (lambda s: s.drop(s.values, s.indices), "positions must be given for .*q_proj|missing"),
    "extra key": (lambda s: s.put("base_model.model.x", torch.zeros(2)), "base_model.model.x unexpected"),
    "another layer": (
        lambda s: s.put("base_model.model.lm_head.supertuning_indices", torch.arange(3)),
        "no other: lm_head|lm_head.supertuning_indices unexpected",
    ),
    "twice and unsorted": (lambda s: s.repeat(), "q_proj.*: indices must be unique"),
    "too large": (lambda s: s.edit(s.indices, -1, 1024), r"q_proj.*: indices must be in \[0, 1024\), got 1024"),
    "negative": (lambda s: s.edit(s.indices, 0, -1), r"q_proj.*: indices must be in \[0, 1024\), got -1"),
    "too few values": (lambda s: s.put(s.values, torch.zeros(101)), r"supertuning_values must be \[102\], got \[101\]"),
    "matrix": (lambda s: s.put(s.indices, torch.zeros(2, 51).int()), r"must be 1-D|must be \[102\], got \[2, 51\]"),
    "NaN": (lambda s: s.edit(s.values, 3, float("nan")), "holds NaN or infinity"),
    "infinity": (lambda s: s.edit(s.values, 3, float("inf")), "holds NaN or infinity"),
    "positions of floats": (lambda s: s.put(s.indices, torch.arange(102.0)), "indices must be int32 or int64|be like"),
    "positions of bytes": (lambda s: s.put(s.indices, torch.arange(102).byte()), "indices must be int32 or int64"),
    "values of integers": (lambda s: s.put(s.values, torch.zeros(102).int()), "must be like torch.float32"),
    "cut file": (lambda s: os.truncate(s.path / FILES[0], 99), "is not a whole safetensors file"),
    "bad JSON": (lambda s: (s.path / FILES[1]).write_text("{"), "is not valid JSON"),
    "no weights": (lambda s: (s.path / FILES[0]).unlink(), "it has no adapter_model.safetensors"),
    "method": (lambda s: s.config(peft_type="IA3"), "one of 'LORA', 'S2FT', 'SPARSE_DELTA', 'SUPERTUNING'"),
    "other family": (lambda s: s.config(peft_type="LORA", r=4), "does not fit the model|is of family lora"),
    "hybrid": (lambda s: s.config(r=4), "r=4 is not supported: Super-Tuning with low-rank factors"),
    "sparsity": (lambda s: s.config(sparsity=2.0), r"sparsity must be in \[0, 1\), got 2.0"),
    "sparsity of text": (lambda s: s.config(sparsity="0.9"), r"sparsity must be in \[0, 1\), got '0.9'"),
}


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_bad_directory_is_named_and_changes_nothing(base, saved, damage, message, injected):
    damage(saved)
    model = made(base, CONFIGS["plain"]).train() if injected else base()
    trained = [parameter.requires_grad for parameter in model.parameters()]
    before = state(model)
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        pk.load_adapter(model, saved.path)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert model.training and [parameter.requires_grad for parameter in model.parameters()] == trained


def test_a_file_for_other_layers_is_refused(base, saved):
    model = made(base, {"density": 0.1, "target_modules": ["q_proj"]})
    with pytest.raises(ValueError, match=r"does not fit the model: .*v_proj.*unexpected"):
        pk.load_adapter(model, saved.path)
    with pytest.raises(ValueError, match=r"supertuning_values must be \[10\], got \[102\]"):
        pk.load_adapter(made(base, {"density": 0.01, "target_modules": ["q_proj", "v_proj"]}), saved.path)


def test_another_family_s_file_is_refused(base, saved, tmp_path):
    lora = base()
    pk.inject(lora, pk.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match="is of family sparse_delta, the model's of lora"):
        pk.load_adapter(lora, saved.path)
    pk.save_adapter(lora, tmp_path / "lora")
    model = made(base, CONFIGS["plain"])
    before = state(model)
    with pytest.raises(ValueError, match="is of family lora, the model's of sparse_delta"):
        pk.load_adapter(model, tmp_path / "lora")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_positions_in_any_order_are_the_same_adapter(base, saved, tokens):
    expected = made(base, CONFIGS["plain"])(tokens).logits
    order = torch.randperm(102, generator=torch.Generator().manual_seed(1))

    def shuffle(tensors):
        for name in (saved.values, saved.indices):
            tensors[name] = tensors[name][order].clone()

    saved.tensors(shuffle)
    model = base()
    pk.load_adapter(model, saved.path)
    assert torch.equal(model(tokens).logits, expected)


def test_int64_positions_in_the_file(base, saved, tokens):
    expected = made(base, CONFIGS["plain"])(tokens).logits
    saved.tensors(lambda t: t.__setitem__(saved.indices, t[saved.indices].long()))
    model = base()
    pk.load_adapter(model, saved.path)
    assert torch.equal(model(tokens).logits, expected)


def test_rounding_to_the_model_s_dtype_is_a_warning(llama, saved):
    model = llama(attention_bias=True, mlp_bias=True, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="4 of the adapter's tensors are rounded"):
        pk.load_adapter(model, saved.path, autocast_adapter_dtype=False)


def test_another_base_model_is_a_warning(base, saved):
    saved.config(base_model_name_or_path="one")
    model = base()
    model.config._name_or_path = model.name_or_path = "two"
    with pytest.warns(UserWarning, match="the adapter was trained on 'one', this model is 'two'"):
        pk.load_adapter(model, saved.path)


@pytest.mark.parametrize("moment", ["_sync", "save_file"])
def test_an_interrupted_save_leaves_the_previous_adapter(base, saved, monkeypatch, moment):
    before = {name: (saved.path / name).read_bytes() for name in FILES}
    model = made(base, CONFIGS["everything"])

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(adapter_files, moment, full_disk)
    with pytest.raises(OSError, match="no space left"):
        pk.save_adapter(model, saved.path)
    assert {path.name: path.read_bytes() for path in saved.path.iterdir()} == before


def test_loading_again_and_again_does_not_drift(base, saved, tokens):
    model = base()
    weights = state(model)
    pk.load_adapter(model, saved.path)
    expected = model(tokens).logits
    for _ in range(3):
        redraw(model)
        model(tokens)
        pk.load_adapter(model, saved.path)
        assert torch.equal(model(tokens).logits, expected)
    pk.eject(model, merge=False)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
