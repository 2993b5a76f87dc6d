"""`peft_kernels.slices`: adapters as objects, taken from models, read from files, added up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels import slices
from peft_kernels.channels import Slice
from peft_kernels.nn import S2FTLinear
from peft_kernels.slices import SliceAdapter, SliceUpdate

from ..support.accuracy import assert_same_bits
from ..support.slices import assert_same_state, dense, edited, small, state, trained, update, with_change


@pytest.mark.parametrize(
    ("change", "shape", "message"),
    [
        (torch.zeros(9, 3), (9, 6), r"change must be floating \[9, 2\], 2 input channels of a weight \[9, 6\], got"),
        (torch.zeros(2, 6), (9, 6), r"change must be floating \[9, 2\]"),
        (torch.zeros(9, 2).int(), (9, 6), r"change must be floating .*, got torch.int32 \[9, 2\]"),
        (torch.zeros(9, 2), (9, 5), "indices must be below 5, got 5"),
    ],
)
def test_updates_that_do_not_fit_are_refused(change, shape, message):
    with pytest.raises(ValueError, match=message):
        SliceUpdate(Slice(torch.tensor([1, 5]), "input"), change, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("co_permute", [False, True])
def test_taking_gives_the_difference_to_the_model_as_it_was_loaded(llama, tokens, dtype, co_permute):
    model = trained(llama(dtype=dtype), co_permute=co_permute)
    expected, adapter = model(tokens).logits, slices.take(model)
    base = llama(dtype=dtype).eval()
    assert adapter.keys() == {path for path, layer in model.named_modules() if isinstance(layer, S2FTLinear)}
    assert adapter.numel == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all(part.change.dtype == torch.float32 for part in adapter.values())
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(with_change(base, adapter)(tokens).logits, expected, **close)
    changes = {path: part.change.clone() for path, part in adapter.items()}
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, S2FTLinear):
                layer.trainable.add_(1.0)
    assert all(torch.equal(part.change, changes[path]) for path, part in adapter.items()), "it follows the training"


def test_taking_from_a_merged_model_is_the_same(llama):
    model = trained(llama())
    before = slices.take(model)
    pk.merge(model)
    for path, part in slices.take(model).items():
        assert_same_bits(part.change, before[path].change)


def test_a_model_without_slices_has_no_adapter():
    with pytest.raises(ValueError, match="model has no S2FTLinear or S2FTConv1D layer; inject an S2FTConfig first"):
        slices.take(small())


def test_an_adapter_says_what_it_is():
    adapter = SliceAdapter({"0": update([1, 2]), "2": update([0], "output", (4, 9))}, "some/base")
    assert repr(adapter) == "SliceAdapter(2 layers, 3 channels, 27 numbers)" and adapter.base_model == "some/base"


def test_a_compiled_model_s_layers_have_the_model_s_paths(llama, tmp_path):
    wrap = torch.compile
    model = trained(llama())
    adapter = slices.take(wrap(model))
    assert adapter.keys() == slices.take(model).keys()
    pk.save_adapter(model, tmp_path)
    base = llama()
    assert slices.read(tmp_path, wrap(base)).keys() == adapter.keys()
    before = state(base)
    switch = slices.Switch(wrap(base))
    switch.to(adapter)
    assert not torch.equal(base.model.layers[0].mlp.down_proj.weight, before["model.layers.0.mlp.down_proj.weight"])
    switch.to(None)
    assert_same_state(base, before)
    slices.serve(wrap(base), {"a": adapter}).stop()
    assert_same_state(base, before)


@pytest.mark.parametrize("co_permute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_gives_what_taking_gave(llama, co_permute, dtype, tmp_path):
    model = trained(llama(dtype=dtype), co_permute=co_permute)
    pk.save_adapter(model, tmp_path)
    base = llama(dtype=dtype)
    before = state(base)
    found, expected = slices.read(tmp_path, base), slices.take(model)
    assert found.keys() == expected.keys()
    for path, part in expected.items():
        assert found[path].slice.dim == part.slice.dim and torch.equal(found[path].slice.indices, part.slice.indices)
        assert_same_bits(found[path].change, part.change)
    assert_same_state(base, before)


LAYER = "base_model.model.model.layers.0.mlp.down_proj"
DAMAGE = {
    "no slice": (lambda t: t.pop(f"{LAYER}.s2ft_trainable"), "has channels of .*down_proj, but no slice of it"),
    "no channels": (lambda t: t.pop(f"{LAYER}.s2ft_input_indices"), "down_proj.s2ft_trainable"),
    "nothing": (lambda t: t.clear(), "holds no slices"),
    "small": (lambda t: t.update({f"{LAYER}.s2ft_trainable": torch.zeros(32, 3)}), "down_proj in .*change must be"),
    "unsorted": (lambda t: t[f"{LAYER}.s2ft_input_indices"].__setitem__(0, 47), "down_proj in .*must be sorted"),
    "too large": (lambda t: t[f"{LAYER}.s2ft_input_indices"].__setitem__(-1, 48), "indices must be below 48, got 48"),
    "NaN": (lambda t: t[f"{LAYER}.s2ft_trainable"].__setitem__(0, float("nan")), "NaN or infinity"),
    "a bias": (lambda t: t.update({"base_model.model.lm_head.base_layer.bias": torch.zeros(64)}), "lm_head.*bias"),
    "a layer": (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(64, 32)}), "lm_head.weight"),
    "elsewhere": (
        lambda t: t.update({k.replace("layers.0", "layers.7"): t.pop(k) for k in list(t) if "layers.0.mlp.d" in k}),
        "layers.7.mlp.down_proj must be a plain nn.Linear or Conv1D, it is missing",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_files_that_are_damaged_or_say_more_are_refused(llama, damage, message, tmp_path):
    pk.save_adapter(trained(llama()), tmp_path)
    edited(tmp_path, damage)
    with pytest.raises(ValueError, match=message):
        slices.read(tmp_path, llama())


def test_other_files_and_models_are_refused(llama, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        slices.read(tmp_path / "nowhere", llama())
    lora = llama()
    pk.inject(lora, pk.LoraConfig(r=2))
    pk.save_adapter(lora, tmp_path / "lora")
    with pytest.raises(ValueError, match="peft_type must be 'S2FT' for a S2FTConfig, got 'LORA'"):
        slices.read(tmp_path / "lora", llama())
    pk.save_adapter(trained(llama()), tmp_path / "s2ft")
    with pytest.raises(
        ValueError, match=r"must be a plain nn\.Linear or Conv1D, it is a S2FTLinear; eject adapters first"
    ):
        slices.read(tmp_path / "s2ft", trained(llama()))
    wider = llama()
    wider.model.layers[0].mlp.down_proj = nn.Linear(48, 33)
    with pytest.raises(ValueError, match=r"0.mlp.down_proj in .*: change must be floating \[33, 9\]"):
        slices.read(tmp_path / "s2ft", wider)


@pytest.mark.parametrize("dim", ["input", "output"])
def test_fusing_adds_changes_up(dim):
    shape = (9, 8)
    parts = [update(indices, dim, shape) for indices in ([0, 3, 7], [1, 3], [], [2, 3, 6, 7])]
    weights = [1.0, -0.5, 2.0, 0.25]
    fused = slices.fuse([SliceAdapter({"0": part}) for part in parts], weights)["0"]
    assert fused.slice.indices.tolist() == [0, 1, 2, 3, 6, 7] and fused.slice.dim == dim
    expected = sum(weight * dense(part).double() for weight, part in zip(weights, parts, strict=True))
    assert_same_bits(dense(fused), expected.float())


def test_disjoint_adapters_stay_as_they_were_trained():
    first = SliceAdapter({"0": update([0, 2]), "2": update([1], "output", (4, 9))}, "base")
    second = SliceAdapter({"0": update([1, 5])}, "base")
    assert slices.overlap(first, second) == 0
    fused = slices.fuse([first, second])
    assert fused.base_model == "base" and list(fused) == ["0", "2"]
    assert_same_bits(fused["0"].change[:, torch.tensor([0, 2])], first["0"].change)
    assert_same_bits(fused["0"].change[:, torch.tensor([1, 3])], second["0"].change)
    assert_same_bits(fused["2"].change, first["2"].change)
    assert first["0"].slice.indices.tolist() == [0, 2], "the adapters themselves stay"
    assert slices.fuse([first, SliceAdapter({"0": update([1])}, "another")]).base_model is None


@pytest.mark.parametrize(("dtypes", "expected"), [("bb", torch.bfloat16), ("bf", torch.float32), ("fd", torch.float64)])
def test_sums_are_in_the_widest_dtype(dtypes, expected):
    known = {"b": torch.bfloat16, "f": torch.float32, "d": torch.float64}
    adapters = [SliceAdapter({"0": update([1], value=2.0, dtype=known[name])}) for name in dtypes]
    change = slices.fuse(adapters)["0"].change
    assert_same_bits(change, torch.full((9, 1), 4.0, dtype=expected))


@pytest.mark.parametrize(
    ("adapters", "weights", "message"),
    [
        ([], None, "adapters must not be empty"),
        ([{"0": update([1])}], [1.0, 2.0], "weights must be 1 finite numbers, got"),
        ([{"0": update([1])}], [float("nan")], "weights must be 1 finite numbers, got"),
        ([{"0": update([1])}, {"0": update([1], "output")}], None, "0: adapters change input channels of a weight"),
        (
            [{"0": update([1])}, {"0": update([1], shape=(9, 7))}],
            None,
            r"output|one \[9, 7\], which no one slice holds",
        ),
    ],
)
def test_what_cannot_be_fused_is_refused(adapters, weights, message):
    with pytest.raises(ValueError, match=message):
        slices.fuse([SliceAdapter(updates) for updates in adapters], weights)


def test_overlap_counts_the_channels_that_both_change():
    first = SliceAdapter({"0": update([0, 2, 5]), "1": update([1])})
    second = SliceAdapter({"0": update([2, 3, 5]), "2": update([1])})
    assert slices.overlap(first, second) == slices.overlap(second, first) == 2
    assert slices.overlap(first, first) == 4
    assert slices.overlap(first, SliceAdapter({"0": update([7, 8], "output")})) > 0, "a row meets every column"
