"""HFT: half of the matrices of each kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_kernels.schedules import HFT

from .nets import WIDTH, net, run

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def build(layers=4, bias=False, **options):
    model = net(layers=layers, bias=bias)
    return model, HFT(model, torch.optim.AdamW(model.parameters(), lr=0.01), **options)


def matrices(names, layer, kinds):
    wanted = {f"layers.{layer}.{part}.{kind}.weight" for part in ("attention", "mlp") for kind in kinds}
    return wanted & set(names)


@pytest.mark.parametrize("seed", range(8))
def test_half_of_each_category_trains_in_every_layer(seed):
    _, schedule = build(layers=6, seed=seed)
    mlp = [len(matrices(schedule.training, layer, MLP)) for layer in range(6)]
    assert mlp in ([1, 2, 1, 2, 1, 2], [2, 1, 2, 1, 2, 1])
    for layer in range(6):
        assert len(matrices(schedule.training, layer, ATTENTION)) == 2
        norms = [name for name in schedule.training if name.startswith(f"layers.{layer}.") and "_norm." in name]
        assert len(norms) == 2 and len({name.rpartition(".")[0] for name in norms}) == 1, "one norm, weight and bias"


def test_with_an_odd_number_of_layers_half_is_missed_by_less_than_one():
    counts = set()
    for seed in range(20):
        _, schedule = build(layers=3, seed=seed)
        counts.add(sum(len(matrices(schedule.training, layer, MLP)) for layer in range(3)))
    assert counts == {4, 5}


def test_each_matrix_trains_half_of_the_rounds():
    _, schedule = build(interval=1)
    rounds = [schedule._names(number) for number in range(400)]
    for name in [*schedule.training, *schedule.frozen]:
        # A standard deviation of 10.
        assert 150 < sum(name in names for names in rounds) < 250, name


def test_biases_go_with_their_matrix():
    _, schedule = build(bias=True, interval=1)
    for number in range(5):
        names = schedule._names(number)
        linear = [name for name in names if "_proj." in name]
        assert linear
        for name in linear:
            path = name.rpartition(".")[0]
            assert {f"{path}.weight", f"{path}.bias"} <= names


@pytest.mark.parametrize(("norms", "count"), [("half", 8), ("train", 16), ("freeze", 0)])
def test_norms(norms, count):
    _, schedule = build(norms=norms)
    assert sum("_norm." in name for name in schedule.training) == count
    assert sum("_norm." in name for name in schedule.frozen) == 16 - count


def test_embeddings():
    outside = {"embedding.weight", "norm.weight", "norm.bias", "head.weight"}
    model, schedule = build()
    assert not outside & {*schedule.training, *schedule.frozen}
    assert all(model.get_parameter(name).requires_grad for name in outside)
    model, schedule = build(embeddings="freeze")
    assert outside <= set(schedule.frozen)
    assert not any(model.get_parameter(name).requires_grad for name in outside)


def test_without_an_interval_one_half_stays():
    model, schedule = build()
    optimizer = schedule._optimizer
    assert len({frozenset(names) for names in run(model, optimizer, schedule, 0, 30, parts=1)}) == 1
    model, schedule = build(interval=10)
    trained = run(model, schedule._optimizer, schedule, 0, 30, parts=1)
    assert [len({frozenset(names) for names in trained[start : start + 10]}) for start in (0, 10, 20)] == [1, 1, 1]
    assert len({frozenset(names) for names in trained}) == 3


def test_the_seed_decides():
    same, again, other = (build(seed=seed)[1].training for seed in (0, 0, 1))
    assert same == again != other


def test_transformers_models():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "num_hidden_layers": 2, "hidden_size": WIDTH, "num_attention_heads": 2}
    expected = {"attention": ("query", "key", "value", "attention.output.dense"), "mlp": ("intermediate", "output")}
    bert = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=12))
    schedule = HFT(bert, torch.optim.SGD(bert.parameters(), lr=0.1))
    assert [len(units) for units in schedule.units["attention"]] == [len(expected["attention"])] * 2
    assert [len(units) for units in schedule.units["mlp"]] == [len(expected["mlp"])] * 2
    assert [len(units) for units in schedule.units["norms"]] == [2, 2]
    assert schedule.units["mlp"][1][1] == ("encoder.layer.1.output.dense.weight", "encoder.layer.1.output.dense.bias")

    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=WIDTH, n_layer=2, n_head=2)
    )
    schedule = HFT(gpt2, torch.optim.SGD(gpt2.parameters(), lr=0.1))
    names = [[unit[0].split(".", 3)[3] for unit in schedule.units[category][0]] for category in ("attention", "mlp")]
    assert names == [["attn.c_attn.weight", "attn.c_proj.weight"], ["mlp.c_fc.weight", "mlp.c_proj.weight"]]


def test_a_matrix_of_all_experts_is_one_matrix_and_a_shared_one_counts_once():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = (nn.Parameter(torch.ones(3, 4, 4)) for _ in range(2))
            self.gate_up_proj_bias, self.scale = (nn.Parameter(torch.ones(4)) for _ in range(2))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Experts(), Experts()])
            self.layers[1].down_proj = self.layers[0].down_proj

    model = Model()
    schedule = HFT(model, torch.optim.SGD(model.parameters(), lr=0.1))
    first, second = schedule.units["mlp"]
    assert first == [
        ("layers.0.gate_up_proj", "layers.0.gate_up_proj_bias", "layers.0.scale"),
        ("layers.0.down_proj",),
    ]
    assert second == [("layers.1.gate_up_proj", "layers.1.gate_up_proj_bias", "layers.1.scale")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval must be an integer of at least 1, got 0"),
        ({"norms": "some"}, "norms must be one of half, train, freeze, got 'some'"),
        ({"embeddings": "half"}, "embeddings must be one of train, freeze, got 'half'"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(options, message):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=message):
        HFT(model, optimizer, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks


def test_a_model_whose_layers_are_all_frozen_is_refused():
    model = net()
    model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match="model must have transformer layers with parameters that train"):
        HFT(model, torch.optim.AdamW(model.parameters()))
