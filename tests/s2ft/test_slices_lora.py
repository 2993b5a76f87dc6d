"""Slices as LoRA and back: equal logits in PEFT and here, exact there and back, and what is no slice refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import peft_kernels as pk
from peft_kernels import slices
from peft_kernels.slices import SliceAdapter

from ..support.accuracy import assert_same_bits
from ..support.slices import RATIOS, SETTINGS, WEIGHTS, dense, edited, trained, update, with_change


@pytest.mark.parametrize("ratios", [RATIOS, {"down": 0.1}, {"q": 0.5}], ids="+".join)
@pytest.mark.parametrize("budget", ["global", "per_layer"])
def test_lora_computes_the_same_in_peft_and_here(llama, tokens, ratios, budget, tmp_path):
    peft = pytest.importorskip("peft")
    model = trained(llama(), ratios=ratios, budget=budget, co_permute=True)
    adapter = slices.take(model)
    slices.to_lora(adapter, tmp_path)
    expected = model(tokens).logits
    theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert sum(1 for name, _ in theirs.named_modules() if name.endswith(".lora_A.default")) == len(adapter)
    ours = llama()
    pk.load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    ranks = {path: layer.r for path, layer in ours.named_modules() if isinstance(layer, pk.nn.LoRALinear)}
    assert ranks == {path: part.slice.indices.numel() for path, part in adapter.items()}
    assert not torch.allclose(llama().eval()(tokens).logits, expected, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_exact(dtype, tmp_path):
    parts = {
        "0": update([0, 3, 5], dtype=dtype),
        "a.2": update([8], "output", dtype=dtype),
        "a+b.3": update([1, 2, 3], "output", (9, 6), dtype=dtype),
        "empty": update([], dtype=dtype),
    }
    slices.to_lora(SliceAdapter(parts, "some/base"), tmp_path)
    back = slices.from_lora(tmp_path)
    assert back.keys() == parts.keys() - {"empty"} and back.base_model == "some/base"
    for path, part in back.items():
        assert part.slice.dim == parts[path].slice.dim and part.shape == parts[path].shape
        assert torch.equal(part.slice.indices, parts[path].slice.indices)
        assert_same_bits(part.change, parts[path].change)


def test_an_adapter_that_changes_nothing_is_no_lora(tmp_path):
    for parts in ({}, {"0": update([])}):
        with pytest.raises(ValueError, match="adapter must change a channel at least"):
            slices.to_lora(SliceAdapter(parts), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_layers_whose_names_end_alike_are_told_apart(tmp_path):
    peft = pytest.importorskip("peft")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.fc = nn.Linear(6, 6)
            self.inner = nn.Sequential()
            self.inner.fc = nn.Linear(6, 6)

        def forward(self, x):
            return self.inner.fc(self.fc(x).tanh())

    x, adapter = torch.randn(3, 6), SliceAdapter({"fc": update([1, 3], shape=(6, 6))})
    slices.to_lora(adapter, tmp_path)
    expected = with_change(Model(), adapter)(x)
    ours = Model()
    pk.load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(x), expected)
    theirs = peft.PeftModel.from_pretrained(Model(), str(tmp_path))
    torch.testing.assert_close(theirs(x), expected)
    ranks = SliceAdapter({"fc": update([1, 3], shape=(6, 6)), "inner.fc": update([0], shape=(6, 6))})
    slices.to_lora(ranks, tmp_path)
    torch.testing.assert_close(
        peft.PeftModel.from_pretrained(Model(), str(tmp_path))(x), with_change(Model(), ranks)(x)
    )


def lora_directory(folder, lora_a, lora_b, extra=None, **config):
    key = "base_model.model.fc"
    tensors = {f"{key}.lora_A.weight": lora_a, f"{key}.lora_B.weight": lora_b, **(extra or {})}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["fc"], **config}
    (folder / SETTINGS).write_text(json.dumps(values))
    return folder


SELECTOR = torch.tensor([[0.0, 0.0, 2.0, 0.0], [-1.0, 0.0, 0.0, 0.0]])


def test_scaling_and_selectors_of_other_numbers_go_into_the_change(tmp_path):
    lora_b = torch.randn(5, 2)
    for config, scaling in (({}, 3.0), ({"use_rslora": True}, 6 / 2**0.5), ({"alpha_pattern": {"fc": 1}}, 0.5)):
        part = slices.from_lora(lora_directory(tmp_path, SELECTOR, lora_b, **config))["fc"]
        assert part.slice.dim == "input" and part.slice.indices.tolist() == [0, 2] and part.shape == (5, 4)
        torch.testing.assert_close(dense(part), scaling * lora_b @ SELECTOR)
    part = slices.from_lora(lora_directory(tmp_path, torch.ones(2, 3), SELECTOR.t()))["fc"]
    assert part.slice.dim == "output" and part.slice.indices.tolist() == [0, 2] and part.shape == (4, 3)
    torch.testing.assert_close(dense(part), 3.0 * SELECTOR.t() @ torch.ones(2, 3))


def test_a_channel_that_is_selected_twice_gets_both_changes(tmp_path):
    twice, lora_b = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]), torch.randn(5, 2)
    part = slices.from_lora(lora_directory(tmp_path, twice, lora_b))["fc"]
    assert part.slice.indices.tolist() == [1]
    torch.testing.assert_close(dense(part), 3.0 * lora_b @ twice)


NOT_SLICES = {
    "dense": ({"lora_a": torch.ones(2, 4)}, "fc: neither lora_A selects input channels nor lora_B output channels"),
    "zero row": ({"lora_a": torch.zeros(2, 4)}, "fc: neither lora_A selects input channels"),
    "half": ({"lora_b": None}, "fc in .*: its factors do not fit each other"),
    "unequal": ({"lora_b": torch.ones(5, 3)}, "fc in .*: its factors do not fit each other"),
    "rank": ({"r": 3}, "fc in .*: its factors have rank 2, expected 3"),
    "dora": ({"use_dora": True}, "use_dora=True is not supported"),
    "method": ({"peft_type": "IA3"}, "peft_type must be 'LORA'"),
    "bias": (
        {"bias": "all", "extra": {"base_model.model.fc.base_layer.bias": torch.ones(5)}},
        "base_model.model.fc.base_layer.bias",
    ),
    "head": ({"extra": {"base_model.model.head.weight": torch.ones(5, 5)}}, "base_model.model.head.weight"),
    "embedding": (
        {"extra": {"base_model.model.e.lora_embedding_A": torch.ones(2, 5)}},
        "base_model.model.e.lora_embedding_A",
    ),
    "half a layer": ({"extra": {"base_model.model.f.lora_B.weight": torch.ones(2, 5)}}, "base_model.model.f.lora_B"),
    "NaN": ({"lora_b": torch.full((5, 2), float("nan"))}, "NaN or infinity"),
    "whole numbers": ({"lora_b": torch.ones(5, 2).int()}, "fc"),
}


@pytest.mark.parametrize(("changes", "message"), NOT_SLICES.values(), ids=NOT_SLICES.keys())
def test_what_is_no_slice_is_refused(changes, message, tmp_path):
    lora_directory(tmp_path, **{"lora_a": SELECTOR, "lora_b": torch.ones(5, 2), **changes})
    with pytest.raises((ValueError, TypeError), match=message):
        slices.from_lora(tmp_path)


def test_a_directory_without_factors_is_refused(tmp_path):
    lora_directory(tmp_path, SELECTOR, torch.ones(5, 2))
    edited(tmp_path, lambda tensors: (tensors.clear(), tensors.update(x=torch.zeros(1))))
    with pytest.raises(ValueError, match=r"no LoRA factors|x"):
        slices.from_lora(tmp_path)
    with pytest.raises(FileNotFoundError):
        slices.from_lora(tmp_path / "nowhere")
