"""Adapter directories of slices: exact both ways, in the channels of the model as it was loaded, checked before use."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft_kernels as pk
from peft_kernels import S2FTConfig, adapter_files
from peft_kernels.nn import S2FTLinear, SwiGLUMLP

from .architectures import build, every_architecture, logits, roles

CONFIGS = {
    "default": {},
    "every role": {"ratios": dict.fromkeys(("q", "k", "v", "o", "up", "gate", "down"), 0.5), "budget": "per_layer"},
    "by weight": {"ratios": {"down": 0.1}, "selection": "weight", "largest": False},
    "unfused": {"ratios": {"down": 0.1}, "fuse_swiglu": False},
    "columns": {"ratio": 0.1, "target_modules": ["q_proj", "down_proj"]},
    "rows": {"ratio": 0.1, "dim": "output", "target_modules": "all-linear"},
    "one layer": {"ratio": 0.1, "target_modules": ["model.layers.0.self_attn.q_proj"]},
    "saved head": {"ratios": {"o": 0.5}, "modules_to_save": ["lm_head"]},
    "all biases": {"ratios": {"o": 0.5, "up": 0.2}, "bias": "all"},
    "co-permuted": {"ratios": {"q": 0.5, "v": 0.5, "o": 0.5, "gate": 0.3, "down": 0.2}, "co_permute": True},
}
FILES = ("adapter_model.safetensors", "adapter_config.json")


def each(configs):
    return pytest.mark.parametrize("options", configs.values(), ids=configs.keys())


@pytest.fixture
def base(llama):
    return lambda: llama(attention_bias=True, mlp_bias=True)


def redraw(model):
    """Adds something to everything that trains."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def made(base, options, seed=3):
    model = base()
    pk.inject(model, S2FTConfig(**options), seed=seed)
    redraw(model)
    return model.eval()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def layers_of(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, S2FTLinear)}


@each(CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(llama, tokens, options, dtype, tmp_path):
    def base():
        return llama(attention_bias=True, mlp_bias=True, dtype=dtype)

    model = made(base, options)
    pk.save_adapter(model, tmp_path)
    expected = model(tokens).logits
    assert not torch.allclose(expected, base().eval()(tokens).logits, rtol=1e-2)
    bare = base()
    report = pk.load_adapter(bare, tmp_path)
    assert report.trainable_parameters == 0 and not bare.training
    assert [type(module) for module in bare.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(bare(tokens).logits, expected)
    for path, layer in layers_of(model).items():
        other = layers_of(bare)[path]
        assert other.dim == layer.dim and torch.equal(other.indices, layer.indices)
        assert torch.equal(other.trainable, layer.trainable) and torch.equal(other.original, layer.original)
    pk.save_adapter(bare, tmp_path / "again")
    first, again = (load_file(folder / FILES[0]) for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    pk.eject(bare, merge=False)
    if "bias" not in options and "modules_to_save" not in options:
        assert_same_state(bare, state(base()))


def test_the_file_holds_slices_by_path_and_their_channels(base, tmp_path):
    model = made(base, CONFIGS["every role"])
    pk.save_adapter(model, tmp_path)
    tensors, values = load_file(tmp_path / FILES[0]), json.loads((tmp_path / FILES[1]).read_text())
    assert values["peft_type"] == "S2FT" and values["inference_mode"] is True
    expected = {}
    for path, layer in layers_of(model).items():
        expected[f"base_model.model.{path}.s2ft_trainable"] = layer.trainable
        expected[f"base_model.model.{path}.s2ft_{layer.dim}_indices"] = layer.indices
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dim", ["input", "output"])
def test_other_channels_are_loaded_into_an_injected_model(base, tokens, dim, tmp_path):
    options = {"ratio": 0.1, "dim": dim, "target_modules": ["q_proj", "down_proj"]}
    model, other = made(base, options), made(base, options, seed=9)
    assert any(
        not torch.equal(layer.indices, layers_of(other)[path].indices) for path, layer in layers_of(model).items()
    )
    pk.save_adapter(model, tmp_path)
    other(tokens)
    assert pk.load_adapter(other, tmp_path) is None
    assert torch.equal(other(tokens).logits, model(tokens).logits)
    for path, layer in layers_of(model).items():
        assert torch.equal(layers_of(other)[path].indices, layer.indices)
    pk.eject(other, merge=False)
    assert_same_state(other, state(base()))


@every_architecture
def test_a_co_permuted_model_s_file_is_about_the_model_as_it_was_loaded(name, tmp_path):
    ratios = dict.fromkeys(roles(name), 0.34)
    model = build(name)
    before = logits(model)
    pk.inject(model, S2FTConfig(ratios=ratios, budget="per_layer", co_permute=True), seed=3)
    redraw(model)
    expected = logits(model)
    pk.save_adapter(model, tmp_path)
    close = {"rtol": 1e-9, "atol": 1e-9 * float(expected.abs().max())}
    assert not torch.allclose(before, expected, rtol=1e-2)
    bare = build(name)
    pk.load_adapter(bare, tmp_path)
    torch.testing.assert_close(logits(bare), expected, **close)
    # Into models whose channels lie otherwise: not moved at all, and moved for another choice.
    for config in (
        S2FTConfig(ratios=ratios, budget="per_layer"),
        S2FTConfig(ratios=ratios, budget="per_layer", co_permute=True),
    ):
        other = build(name)
        slices = pk.channels.select(other, ratios, seed=8, budget="per_layer", coupled=True).slices
        pk.inject(other, config, positions=slices)
        pk.load_adapter(other, tmp_path)
        torch.testing.assert_close(logits(other), expected, **close)
        pk.save_adapter(other, tmp_path / "again")
        first, again = (load_file(folder / FILES[0]) for folder in (tmp_path, tmp_path / "again"))
        assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
        pk.eject(other, merge=False)
        assert_same_state(other, state(build(name)))
    pk.eject(bare, merge=True)
    torch.testing.assert_close(logits(bare), expected, **close)


def test_what_was_chosen_by_calibration_is_loaded_without_it(base, tokens, tmp_path):
    model = base()
    config = S2FTConfig(selection="activation", largest=False, co_permute=True)
    pk.inject(model, config, calibration=[{"input_ids": tokens}])
    redraw(model)
    pk.save_adapter(model.eval(), tmp_path)
    bare = base()
    pk.load_adapter(bare, tmp_path)
    assert torch.equal(bare(tokens).logits, model(tokens).logits)


def test_a_trainable_load_trains(base, tokens, tmp_path):
    pk.save_adapter(made(base, CONFIGS["default"]), tmp_path)
    model = base()
    report = pk.load_adapter(model, tmp_path, is_trainable=True)
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    assert all(name.endswith("trainable") for name, p in model.named_parameters() if p.requires_grad)
    optimizer = pk.optim.SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_merged_model_saves_the_same_adapter_and_loads_none(base, tmp_path):
    model = made(base, CONFIGS["default"])
    pk.save_adapter(model, tmp_path / "before")
    pk.merge(model)
    pk.save_adapter(model, tmp_path / "merged")
    for name in FILES:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    before = state(model)
    with pytest.raises(ValueError, match="model has merged layers; unmerge it"):
        pk.load_adapter(model, tmp_path / "before")
    assert_same_state(model, before)


def test_a_hand_made_model_of_both_dims_describes_itself(tmp_path):
    def linears():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))

    def hand_made():
        model = linears()
        for index, (dim, count) in {0: ("input", 5), 2: ("output", 2)}.items():
            model[index] = S2FTLinear.from_linear(model[index], num_channels=count, dim=dim)
            with torch.no_grad():
                model[index].trainable.normal_()
        return model

    model, x = hand_made(), torch.randn(4, 8)
    pk.save_adapter(model, tmp_path)
    torch.manual_seed(5)
    other = hand_made()
    pk.load_adapter(other, tmp_path)
    assert torch.equal(other(x), model(x))
    bare = linears()
    pk.load_adapter(bare, tmp_path)
    assert [type(layer).__name__ for layer in bare] == ["S2FTLinear", "Linear", "S2FTLinear"]
    assert torch.equal(bare(x), model(x))


@pytest.fixture(params=[False, True], ids=["in place", "co-permuted"])
def saved(request, base, tmp_path):
    """A directory with an adapter over down_proj, and functions that edit its files."""
    options = {"ratios": {"down": 0.1}, "budget": "per_layer", "co_permute": request.param}
    pk.save_adapter(made(base, options), tmp_path)

    class Saved:
        path, given = tmp_path, options
        layer = "base_model.model.model.layers.0.mlp.down_proj"
        trainable, indices = f"{layer}.s2ft_trainable", f"{layer}.s2ft_input_indices"

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

        def rename(self, old, new):
            self.tensors(lambda tensors: tensors.__setitem__(new, tensors.pop(old)))

    return Saved()


OTHER_DIM = "base_model.model.model.layers.0.mlp.down_proj.s2ft_output_indices"
DAMAGE = {
    "no slice": (lambda s: s.drop(s.trainable), "does not fit the model: .*s2ft_trainable missing"),
    "no channels": (lambda s: s.drop(s.indices), "s2ft_input_indices missing|s2ft_trainable unexpected"),
    "extra key": (lambda s: s.put("base_model.model.x", torch.zeros(2)), "base_model.model.x unexpected"),
    "another layer": (
        lambda s: s.put("base_model.model.lm_head.s2ft_input_indices", torch.arange(3)),
        "positions must be given for adapted layers only: lm_head|lm_head.s2ft_input_indices unexpected",
    ),
    "other dim": (lambda s: s.rename(s.indices, OTHER_DIM), "indices must be in|s2ft_input_indices missing"),
    "both dims": (lambda s: s.put(OTHER_DIM, torch.arange(4)), "s2ft_output_indices unexpected|input and output"),
    "unsorted": (lambda s: s.edit(s.indices, 0, 40), "down_proj.*indices must be sorted"),
    "twice": (lambda s: s.put(s.indices, torch.tensor([1, 1, 2, 3])), "down_proj.*indices must be sorted"),
    "too large": (lambda s: s.edit(s.indices, -1, 48), r"down_proj.*: indices must be in \[0, 48\), got 48"),
    "negative": (lambda s: s.edit(s.indices, 0, -1), "down_proj.*indices must be sorted, unique and not negative"),
    "small slice": (lambda s: s.put(s.trainable, torch.zeros(32, 3)), r"trainable must be \[32, 4\], got \[32, 3"),
    "turned slice": (lambda s: s.put(s.trainable, torch.zeros(4, 32)), r"trainable must be \[32, 4\], got \[4, 32"),
    "matrix": (lambda s: s.put(s.indices, torch.zeros(2, 2).long()), r"indices must be int64 \[s\]|must be \[4\], got"),
    "NaN": (lambda s: s.edit(s.trainable, 3, float("nan")), "holds NaN or infinity"),
    "infinity": (lambda s: s.edit(s.trainable, 3, float("inf")), "holds NaN or infinity"),
    "float channels": (lambda s: s.put(s.indices, torch.arange(4.0)), r"indices must be int64 \[s\]|be like"),
    "short channels": (lambda s: s.put(s.indices, torch.arange(4).int()), r"indices must be int64 \[s\]"),
    "whole numbers": (lambda s: s.put(s.trainable, torch.zeros(32, 4).int()), "must be like torch.float32"),
    "cut file": (lambda s: os.truncate(s.path / FILES[0], 99), "is not a whole safetensors file"),
    "bad JSON": (lambda s: (s.path / FILES[1]).write_text("{"), "is not valid JSON"),
    "no weights": (lambda s: (s.path / FILES[0]).unlink(), "it has no adapter_model.safetensors"),
    "method": (lambda s: s.config(peft_type="IA3"), "peft_type must be one of .*'S2FT'.*, got 'IA3'"),
    "other family": (lambda s: s.config(peft_type="LORA", r=4), "does not fit the model|is of family lora"),
    "ratio": (lambda s: s.config(ratios={"down": 2}), r"ratios\['down'\] must be in \(0, 1\], got 2"),
    "budget": (lambda s: s.config(budget="some"), "budget must be one of global, per_layer, got 'some'"),
}


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.filterwarnings("ignore:LoraConfig ignores options")
def test_a_bad_directory_is_named_and_changes_nothing(base, saved, damage, message, injected):
    damage(saved)
    model = made(base, saved.given).train() if injected else base()
    trained = [parameter.requires_grad for parameter in model.parameters()]
    kinds, before = [type(module) for module in model.modules()], state(model)
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        pk.load_adapter(model, saved.path)
    assert_same_state(model, before)
    assert model.training and [parameter.requires_grad for parameter in model.parameters()] == trained
    assert [type(module) for module in model.modules()] == kinds


def test_a_file_for_other_layers_is_refused(base, saved):
    short = made(base, saved.given)
    saved_state = state(short)
    pk.save_adapter(made(base, {**saved.given, "target_modules": ["model.layers.1.mlp.down_proj"]}), saved.path / "one")
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj.* missing"):
        pk.load_adapter(short, saved.path / "one")
    assert_same_state(short, saved_state)
    model = made(base, {"ratios": {"o": 0.5}})
    with pytest.raises(ValueError, match=r"does not fit the model: .*o_proj.* missing; .*down_proj.* unexpected"):
        pk.load_adapter(model, saved.path)
    other = made(base, {"ratios": {"down": 0.2}, "budget": "per_layer"})
    before = state(other)
    with pytest.raises(ValueError, match=r"does not fit the model: .* must be \[9?.*\], got \[.*4?\]"):
        pk.load_adapter(other, saved.path)
    assert_same_state(other, before)


def test_another_family_s_file_is_refused(base, saved, tmp_path):
    lora = base()
    pk.inject(lora, pk.LoraConfig(r=2, target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="is of family s2ft, the model's of lora"):
        pk.load_adapter(lora, saved.path)
    pk.save_adapter(lora, tmp_path / "lora")
    model = made(base, saved.given)
    before = state(model)
    with pytest.raises(ValueError, match="is of family lora, the model's of s2ft"):
        pk.load_adapter(model, tmp_path / "lora")
    assert_same_state(model, before)


def test_rounding_to_the_model_s_dtype_is_a_warning(llama, saved):
    model = llama(attention_bias=True, mlp_bias=True, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="2 of the adapter's tensors are rounded"):
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
    model = made(base, CONFIGS["every role"])

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(adapter_files, moment, full_disk)
    with pytest.raises(OSError, match="no space left"):
        pk.save_adapter(model, saved.path)
    assert {path.name: path.read_bytes() for path in saved.path.iterdir()} == before


def test_loading_again_and_again_does_not_drift(base, saved, tokens):
    model = base()
    weights = state(model)
    pk.load_adapter(model, saved.path, is_trainable=True)
    model.eval()
    expected = model(tokens).logits
    for _ in range(3):
        redraw(model)
        assert not torch.equal(model(tokens).logits, expected)
        pk.load_adapter(model, saved.path)
        assert torch.equal(model(tokens).logits, expected)
    pk.eject(model, merge=False)
    assert_same_state(model, weights)
    assert not any(isinstance(module, SwiGLUMLP) for module in model.modules())


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"bias": "all"}, r'co_permute moves channels of model\.layers\.0\..*q_proj, and bias="all" trains it'),
        ({"modules_to_save": ["gate_proj"]}, r"co_permute moves channels of .*gate_proj, and modules_to_save trains"),
    ],
)
def test_channels_that_a_file_could_not_move_back_are_not_moved(base, beside, message):
    # A file holds biases and whole modules as they lie, and slices by the channels of the model as it was loaded.
    model = base()
    ratios = {"q": 0.5, "o": 0.5, "down": 0.2}
    with pytest.raises(ValueError, match=message):
        pk.inject(model, S2FTConfig(ratios=ratios, budget="per_layer", co_permute=True, **beside), seed=3)
    assert_same_state(model, state(base()))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("beside", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}], ids=["head", "no such bias"])
def test_what_trains_beside_co_permuted_slices_means_the_same_in_any_model(llama, tokens, beside, tmp_path):
    options = {"ratios": {"q": 0.5, "o": 0.5, "down": 0.2}, "budget": "per_layer", **beside}
    model = made(llama, {**options, "co_permute": True})
    pk.save_adapter(model, tmp_path)
    slices = {path: update.slice for path, update in pk.slices.take(model).items()}
    other = llama().eval()
    pk.inject(other, S2FTConfig(**options), positions=slices)
    pk.load_adapter(other, tmp_path)
    torch.testing.assert_close(other(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
