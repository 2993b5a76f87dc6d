"""`inject` with a `WTACRSConfig`: over LoRA and over trainable layers, what a model keeps, and the way back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels import LoraConfig, TokenEliminationConfig, WTACRSConfig
from peft_kernels.nn import LoRALinear, WTACRSLinear

from ..token_elimination.models import build, gradients, layers_of, tokens
from .test_layers import kept_storages

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HIDDEN, INTERMEDIATE, HEADS, GROUPS, DEPTH, RANK = 64, 160, 4, 2, 16, 3
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": DEPTH,
    "num_hidden_layers": 1,
}


def adapted(keep_ratio=None, dtype=torch.float32, names=None, **sizes):
    model = build("llama", dtype, **sizes)
    pk.inject(model, LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False), seed=2)
    if keep_ratio is not None:
        pk.inject(model, WTACRSConfig(keep_ratio, names))
    return model


def loss_of(model, batch=None):
    batch = tokens() if batch is None else batch
    return model(input_ids=batch, labels=batch).loss


def test_every_adapter_samples_and_only_a_is_an_estimate():
    model, dense = adapted(0.3), adapted()
    assert len(pk.wta_crs.sampling_layers(model)) == 4 * 7
    loss, exact = loss_of(model), loss_of(dense)
    assert torch.equal(loss, exact)
    found, expected = gradients(model, loss), gradients(dense, exact)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert torch.equal(grad, expected[name]) == ("lora_b" in name), name


def test_keeping_everything_is_the_dense_model_to_the_bit():
    model, dense = adapted(1.0), adapted()
    found, expected = gradients(model, loss_of(model)), gradients(dense, loss_of(dense))
    assert all(torch.equal(grad, expected[name]) for name, grad in found.items())


def layer_bytes(model, length=256):
    """Bytes of the storages that one call of the first decoder layer keeps."""
    x = torch.randn(1, length, HIDDEN).to(next(model.parameters()).dtype).requires_grad_()
    position_ids = torch.arange(length)[None]
    tables = model.model.rotary_emb(x, position_ids)

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layers_of(model)[0]

        def forward(self, x):
            return self.layer(x, position_embeddings=tables, position_ids=position_ids)

    return sum(kept_storages(Called(), x)[0].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_layer_keeps_less_by_the_formula(dtype):
    length, keep, size = 256, 0.25, dtype.itemsize
    kept = int(keep * length)
    # Inputs of q, k and v, of gate and up, and of down, which nothing but the gradient of A needs; o reads attention's
    # output, which attention keeps itself.
    names = [name for name in LINEAR if name != "o_proj"]
    before, after = layer_bytes(adapted(dtype=dtype, **SIZES)), layer_bytes(adapted(keep, dtype, names, **SIZES))
    assert before - after == (length - kept) * size * (2 * HIDDEN + INTERMEDIATE) - 3 * 8 * kept
    everything = layer_bytes(adapted(keep, dtype, **SIZES))
    assert everything - after == kept * (size * HEADS * DEPTH + 8)


@pytest.mark.parametrize("first", ["elimination", "sampling"])
def test_token_elimination_goes_with_it(first):
    def both(keep_ratio, order):
        model = adapted(**SIZES | {"num_hidden_layers": 3})
        configs = [TokenEliminationConfig(0.5, layers=[1], block_size=4, score="norm"), WTACRSConfig(keep_ratio)]
        for config in configs if order == "elimination" else reversed(configs):
            pk.inject(model, config)
        return model

    model, exact = both(0.3, first), both(1.0, first)
    torch.manual_seed(3)
    found = gradients(model, loss_of(model))
    expected = gradients(exact, loss_of(exact))
    assert found.keys() == expected.keys()
    same = {name for name, grad in found.items() if torch.equal(grad, expected[name])}
    # In the layer that eliminates tokens all but attention's output is formed again, so that nothing is sampled there.
    assert {name for name in found if name not in same} == {
        name for name in found if "lora_a" in name and (".1." not in name or "o_proj" in name)
    }
    pk.eject(model, merge=False)
    assert not pk.wta_crs.sampling_layers(model) and not pk.elimination.eliminating_layers(model)


def test_layers_that_train_become_drop_ins_and_plain_again():
    model, dense = build(num_hidden_layers=1), build(num_hidden_layers=1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = pk.inject(model, WTACRSConfig(0.3))
    assert [row.path.rpartition(".")[2] for row in report.fused] == list(LINEAR)
    assert {row.path: row.reason for row in report.left_alone} == {
        "lm_head": "the output layer, which all-linear leaves out"
    }
    assert "7 of 8 layers sampling" in str(report) and "each keeps 0.3 of its input's rows" in str(report)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()
    found, expected = gradients(model, loss_of(model)), gradients(dense, loss_of(dense))
    differing = {name for name, grad in found.items() if not torch.allclose(grad, expected[name])}
    assert differing == {name for name in found if any(f"{layer}.weight" in name for layer in LINEAR)}
    pk.eject(model)
    assert not any(isinstance(module, WTACRSLinear) for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="model has no layers with a sampled gradient"):
        pk.wta_crs.remove(model)


def test_removing_leaves_adapters_and_their_state_dict():
    model = adapted(0.3, num_hidden_layers=1)
    names = list(model.state_dict())
    pk.wta_crs.remove(model)
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    assert len(layers) == 7 and all(layer.row_sampling is None for layer in layers)
    assert list(model.state_dict()) == names == list(adapted(num_hidden_layers=1).state_dict())


def test_files_of_adapters_do_not_change(tmp_path):
    model = adapted(0.3, num_hidden_layers=1)
    pk.save_adapter(model, tmp_path / "sampled")
    pk.save_adapter(adapted(num_hidden_layers=1), tmp_path / "dense")
    for file in (tmp_path / "dense").iterdir():
        assert (tmp_path / "sampled" / file.name).read_bytes() == file.read_bytes()


def test_a_layer_at_two_places_is_one_layer():
    linear = nn.Linear(6, 6)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    pk.inject(model, WTACRSConfig(0.5))
    assert model[0] is model[2] and model[0].weight is linear.weight
    pk.wta_crs.remove(model)
    assert model[0] is model[2] and type(model[0]) is nn.Linear


def mixed():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    model[1].requires_grad_(False)
    return model


def test_which_layers_are_named():
    report = pk.inject(mixed(), WTACRSConfig(0.5))
    assert [row.path for row in report.fused] == ["0", "3"]
    assert report.left_alone[0].reason == "its weight does not train, so it keeps no input"
    report = pk.inject(mixed(), WTACRSConfig(0.5, ["3"]))
    assert [row.path for row in report.fused] == ["3"]
    report = pk.inject(mixed(), WTACRSConfig(0.5, exclude_modules="0"))
    assert [row.path for row in report.fused] == ["3"]
    assert report.left_alone[0].reason == "exclude_modules names it"


def of_peft():
    layer = nn.Module()
    layer.base_layer, layer.lora_A = nn.Linear(4, 4), nn.ModuleDict({"default": nn.Linear(4, 2)})
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("model", "config", "error", "message"),
    [
        (mixed, WTACRSConfig(0.5, ["1", "3"]), ValueError, "1: its weight does not train, so it keeps no input"),
        (mixed, WTACRSConfig(0.5, ["2"]), ValueError, r"2: it is a nn\.ReLU, not an nn\.Linear"),
        (mixed, WTACRSConfig(0.5, ["4"]), ValueError, "no layer's gradient can be sampled: 0: target_modules does not"),
        (of_peft, WTACRSConfig(0.5), ValueError, r"model has PEFT adapters \(at 0\); sampling needs layers of ours"),
        (nn.ReLU, WTACRSConfig(0.5), ValueError, "the model has no linear layer"),
        (lambda: nn.Linear(3, 2), WTACRSConfig(0.5), ValueError, r"the whole model; use nn\.WTACRSLinear\.from_linear"),
        (lambda: torch.compile(mixed()), WTACRSConfig(0.5), ValueError, r"model is wrapped by torch\.compile"),
        (lambda: "model", WTACRSConfig(0.5), TypeError, r"model must be an nn\.Module, got str"),
    ],
)
def test_what_cannot_sample_is_refused(model, config, error, message):
    model = model()
    with pytest.raises(error, match=message):
        pk.inject(model, config)
    if isinstance(model, nn.Module):
        assert not any(isinstance(module, WTACRSLinear) for module in model.modules())


def test_twice_is_refused_and_other_arguments_too():
    model = mixed()
    pk.inject(model, WTACRSConfig(0.5))
    with pytest.raises(ValueError, match=r"model samples gradients already \(at 0\); wta_crs\.remove it first"):
        pk.inject(model, WTACRSConfig(0.5))
    with pytest.raises(ValueError, match="seed must be None with a WTACRSConfig, got 3"):
        pk.inject(mixed(), WTACRSConfig(0.5), seed=3)
    with pytest.raises(ValueError, match=r"use its to_linear\(\)"):
        pk.wta_crs.remove(WTACRSLinear(3, 2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep_ratio": 0}, ValueError, r"WTACRSConfig: keep_ratio must be a number in \(0, 1\], got 0"),
        ({"target_modules": 3}, TypeError, "target_modules must be a list of names"),
        ({"exclude_modules": [1]}, TypeError, "exclude_modules must be a list of names"),
    ],
)
def test_bad_configurations_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        WTACRSConfig(**options)
