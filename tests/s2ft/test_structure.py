"""Heads and channels are found by structure; what is not understood is said, and nothing of the model is changed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft_kernels.channels import Attention, Mlp, Span, Structure, confirm_structure, find_structure

from ..support.accuracy import assert_same_bits
from .architectures import ARCHITECTURES, build, every_architecture, flags, from_config, logits, roles, state

POSITIONS = {"input_ids": torch.tensor([[5, 6, 7]])}


def reasons(structure: Structure) -> dict[str, str]:
    return {item.path: item.reason for item in structure.not_understood}


@every_architecture
def test_every_layer_of_every_block_is_found(name):
    architecture = ARCHITECTURES[name]
    model = build(name)
    found = find_structure(model)
    assert len(found.attentions) == len(found.mlps) == 2
    for attention, mlp in zip(found.attentions, found.mlps, strict=True):
        assert (attention.heads, attention.key_value_heads, attention.head_dim) == architecture.heads
        assert mlp.channels == architecture.channels
        assert attention.obstacle is None and mlp.obstacle is None
    expected: dict[str, tuple[str, ...]] = {}
    for role, path in roles(name).items():
        expected[path] = (*expected.get(path, ()), role)
    first = {path: of for path, of in found.roles().items() if path.startswith(f"{architecture.prefix}.")}
    assert first == expected
    # Only the output layer makes and consumes no hidden channels.
    assert set(reasons(found)) == {"lm_head"}


@every_architecture
def test_what_is_found_is_confirmed_by_the_model(name):
    model = build(name)
    found = find_structure(model)
    assert confirm_structure(model, POSITIONS) == found


def test_fused_layers_have_their_parts():
    attention, mlp = (of[0] for of in (find_structure(build("phi3")).attentions, find_structure(build("phi3")).mlps))
    path = "model.layers.0.self_attn.qkv_proj"
    assert attention.inputs == (Span(path, 0, 24), Span(path, 24, 12), Span(path, 36, 12))
    path = "model.layers.0.mlp.gate_up_proj"
    assert (mlp.gate, mlp.up) == (Span(path, 0, 39), Span(path, 39, 39))
    attention = find_structure(build("gpt2")).attentions[0]
    path = "transformer.h.0.attn.c_attn"
    assert attention.inputs == (Span(path, 0, 24), Span(path, 24, 24), Span(path, 48, 24))


def test_units_are_heads_groups_or_channels():
    structure = find_structure(build("phi3"))
    attention = structure.attentions[0]
    assert [(of.first, of.count, of.width, of.dim) for of in map(attention.units, "qkvo")] == [
        (0, 6, 4, "output"),
        (24, 3, 4, "output"),
        (36, 3, 4, "output"),
        (0, 6, 4, "input"),
    ]
    groups = [attention.units(role, groups=True) for role in "qkvo"]
    assert [(of.first, of.count, of.width) for of in groups] == [(0, 3, 8), (24, 3, 4), (36, 3, 4), (0, 3, 8)]
    assert [of.path for of in structure.units("down")] == [f"model.layers.{n}.mlp.down_proj" for n in (0, 1)]
    assert find_structure(build("gpt2")).units("gate") == ()
    with pytest.raises(ValueError, match=r"role must be one of q, k, v, o, up, gate, down, got 'query'"):
        structure.units("query")


def test_interleaved_heads_are_not_guessed():
    small = {"vocab_size": 64, "hidden_size": 24}
    bloom = from_config("BloomConfig", **small, n_layer=1, n_head=4)
    found = reasons(find_structure(bloom))
    assert found["transformer.h.0.self_attention"] == "models lay query_key_value out in different ways"
    # The layers of a block that is not understood are not named again; its MLP is understood.
    assert set(found) == {"transformer.h.0.self_attention", "lm_head"}
    assert len(find_structure(bloom).mlps) == 1


def test_confirming_finds_a_layout_that_names_hide():
    # CodeGen's qkv_proj has four blocks of queries, values and keys.
    codegen = from_config(
        "CodeGenConfig", vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=16, n_inner=39
    )
    found = find_structure(codegen)
    assert len(found.attentions) == 1
    confirmed = confirm_structure(codegen, POSITIONS)
    assert confirmed.attentions == ()
    assert confirmed.mlps == found.mlps
    assert (
        "does not get means of the values of transformer.h.0.attn.qkv_proj"
        in reasons(confirmed)["transformer.h.0.attn"]
    )


def test_sinks_belong_to_heads():
    options = ARCHITECTURES["qwen3"].options | {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size": 40,
    }
    model = from_config("GptOssConfig", torch.float32, **options)
    structure = find_structure(model)
    assert "self_attn.sinks [4] may belong to heads" in structure.attentions[0].obstacle
    # Experts in one tensor are no layers.
    assert "is a parameter of its own" in reasons(structure)["model.layers.0.mlp.experts"]
    confirmed = confirm_structure(model, POSITIONS)
    assert confirmed.attentions == ()


def test_norms_over_all_heads_belong_to_heads():
    model = from_config("Olmo2Config", **ARCHITECTURES["llama"].options)
    attentions = find_structure(model).attentions
    assert all("self_attn.q_norm.weight [24] may belong to heads" in of.obstacle for of in attentions)
    # With one head there is nothing to tell apart; the norm is that head's.
    alone = from_config(
        "Olmo2Config", **ARCHITECTURES["llama"].options | {"num_attention_heads": 1, "num_key_value_heads": 1}
    )
    assert find_structure(alone).attentions[0].obstacle is None


def test_a_norm_between_the_layers_of_an_mlp_belongs_to_channels():
    model = from_config("BitNetConfig", **ARCHITECTURES["llama"].options)
    structure = find_structure(model)
    assert "ffn_sub_norm.weight [39] may belong to channels" in structure.mlps[0].obstacle
    confirmed = confirm_structure(model, POSITIONS)
    assert confirmed.mlps == ()
    assert "depend on more than one" in reasons(confirmed)["model.layers.0.mlp"]


class Block(nn.Module):
    """Attention by its layers' names and sizes only."""

    def __init__(self, head_dim: int = 4, **sizes: tuple[int, int]) -> None:
        super().__init__()
        self.head_dim = head_dim
        for name, (inputs, outputs) in sizes.items():
            setattr(self, name, nn.Linear(inputs, outputs))


def split(q=(8, 16), k=(8, 8), v=(8, 8), o=(16, 8), **more):
    return Block(q_proj=q, k_proj=k, v_proj=v, o_proj=o, **more)


class Positioned(Block):
    def forward(self, hidden_states, position_bias=None):
        raise NotImplementedError


def test_the_smallest_block_is_the_model_itself():
    structure = find_structure(split())
    assert structure.attentions == (
        Attention(
            path="",
            query=Span("q_proj", 0, 16),
            key=Span("k_proj", 0, 8),
            value=Span("v_proj", 0, 8),
            output="o_proj",
            heads=4,
            key_value_heads=2,
            head_dim=4,
        ),
    )
    assert structure.not_understood == ()
    assert structure.attentions[0].group_size == 2


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (
            split(o=(12, 8)),
            "channels do not fit heads of 4: q_proj makes 16, k_proj makes 8, v_proj makes 8, o_proj takes 12",
        ),
        (split(v=(8, 12)), "channels do not fit heads of 4"),
        (split(k=(8, 12), v=(8, 12)), "channels do not fit heads of 4"),
        (split(head_dim=5), "channels do not fit heads of 5"),
        (split(head_dim=0), "neither head_dim nor num_heads says how large a head is"),
        (split(g_proj=(8, 16)), "the part of its layer g_proj is not known"),
        (Block(q_proj=(8, 8), k_proj=(8, 8)), "no layer in it is known as v, o"),
        (Block(qkv_proj=(8, 25), o_proj=(8, 8)), "channels do not fit heads of 4"),
    ],
)
def test_attention_that_does_not_fit_is_reported(block, reason):
    structure = find_structure(nn.ModuleDict({"a": block}))
    assert structure.attentions == ()
    assert reason in reasons(structure)["a"]


def test_a_block_that_contradicts_itself_is_reported():
    block = split()
    block.num_heads = 2
    assert reasons(find_structure(block)) == {"": "it says num_heads=2, but its layers make it 4"}


def test_things_bound_to_heads_are_seen():
    block = split()
    assert find_structure(block).attentions[0].obstacle is None
    block.register_buffer("slopes", torch.ones(4))
    assert "slopes [4] may belong to heads" in find_structure(block).attentions[0].obstacle
    block = split()
    block.config = SimpleNamespace(num_kv_shared_layers=1)
    assert "may share keys and values with other layers" in find_structure(block).attentions[0].obstacle
    block = split()
    block.norms = nn.ModuleList([nn.LayerNorm(4) for _ in range(4)])  # one for each head
    assert "norms.0.weight [4] may belong to heads" in find_structure(block).attentions[0].obstacle
    block = split()
    block.norm = nn.LayerNorm(4)  # one for all
    assert find_structure(block).attentions[0].obstacle is None
    positioned = Positioned(q_proj=(8, 16), k_proj=(8, 8), v_proj=(8, 8), o_proj=(16, 8))
    assert "takes position_bias" in find_structure(positioned).attentions[0].obstacle


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (
            Block(gate_proj=(8, 12), up_proj=(8, 12), down_proj=(11, 8)),
            "gate_proj makes 12, up_proj makes 12, down_proj takes 11",
        ),
        (Block(fc1=(8, 24), fc2=(12, 8)), "fc1 makes 24, fc2 takes 12"),
        (Block(gate_up_proj=(8, 12), down_proj=(12, 8)), "gate_up_proj makes 12, down_proj takes 12"),
        (Block(fc1=(8, 12), fc2=(12, 8), fc3=(8, 8)), "the part of its layer fc3 is not known"),
    ],
)
def test_an_mlp_that_does_not_fit_is_reported(block, reason):
    structure = find_structure(nn.ModuleDict({"m": block}))
    assert structure.mlps == ()
    assert reason in reasons(structure)["m"]


def test_layers_that_are_not_plain_are_reported():
    mlp = Block(fc1=(8, 12), fc2=(12, 8))
    nn.utils.parametrizations.weight_norm(mlp.fc1)
    assert reasons(find_structure(mlp)) == {"": "fc1: its weight is parametrized"}
    mlp = Block(fc1=(8, 12), fc2=(12, 8))
    mlp.fc2.register_buffer("mask", torch.ones(8, 12))
    assert reasons(find_structure(mlp)) == {"": "fc2: it holds more than weight and bias"}
    mlp = Block(fc1=(8, 12), fc2=(12, 8))
    mlp.fc2 = nn.Conv1d(12, 8, 1)
    assert reasons(find_structure(mlp)) == {"": "fc2: it is a nn.Conv1d, not a linear layer"}


def test_layers_outside_are_reported():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 3))
    assert reasons(find_structure(model)) == {
        "1": "a nn.Linear outside of attention blocks and MLPs",
        "3": "a nn.Conv1d outside of attention blocks and MLPs",
    }
    assert "not understood: 1: a nn.Linear" in str(find_structure(model))


class Swapped(nn.Module):
    """An MLP that gates what its name calls the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.down_proj(torch.relu(self.up_proj(x)).square() * self.gate_proj(x))


class Idle(Swapped):
    def forward(self, x):
        return self.down_proj(torch.relu(self.gate_proj(x)))


def test_confirming_knows_the_gate_and_what_is_not_used():
    assert find_structure(Swapped()).mlps[0] == Mlp(
        "", Span("gate_proj", 0, 12), Span("up_proj", 0, 12), "down_proj", 12
    )
    inputs = {"x": torch.ones(3, 8)}
    assert "product of up_proj and a gate" in reasons(confirm_structure(Swapped(), inputs))[""]
    assert reasons(confirm_structure(Idle(), inputs))[""] == "up_proj was not called"


class Biased(nn.Module):
    """Attention with a bias on the scores of each head that nothing about the module tells."""

    def __init__(self) -> None:
        super().__init__()
        self.block = split()

    def forward(self, x):
        length = x.shape[0]
        heads = (self.block.q_proj(x), self.block.k_proj(x), self.block.v_proj(x))
        q, k, v = (part.view(length, -1, 4).transpose(0, 1) for part in heads)
        bias = torch.arange(4.0).view(4, 1, 1) * torch.arange(float(length))
        scores = q @ k.repeat_interleave(2, 0).mT + bias
        return self.block.o_proj((scores.softmax(-1) @ v.repeat_interleave(2, 0)).transpose(0, 1).flatten(1))


class Scaled(Swapped):
    def forward(self, x):
        return self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x) * torch.arange(1.0, 13.0))


def test_confirming_finds_what_goes_by_numbers():
    inputs = {"x": torch.ones(3, 8)}
    assert find_structure(Biased()).attentions[0].obstacle is None
    confirmed = confirm_structure(Biased(), inputs)
    assert [of.obstacle for of in confirmed.attentions] == ["what block.o_proj gets belongs to heads by their numbers"]
    assert find_structure(Scaled()).mlps[0].obstacle is None
    confirmed = confirm_structure(Scaled(), inputs)
    assert [of.obstacle for of in confirmed.mlps] == ["what down_proj gets belongs to channels by their numbers"]
    assert [of.path for of in confirmed.attentions] == []


def test_confirming_leaves_the_model_as_it_was():
    model = build("llama-grouped")
    model.train()
    model.model.layers[0].mlp.eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(24, dtype=torch.float64)
    before, expected = state(model), logits(model)
    flags_before = flags(model)
    confirm_structure(model, POSITIONS)
    with pytest.raises(ValueError, match=r"inputs must hold at least two positions, but .* got \[1, 1\]"):
        confirm_structure(model, {"input_ids": torch.tensor([[5]])})
    after = flags(model)
    assert after[0] == flags_before[0] and after[2] == flags_before[2] == 0
    for (required, gradient), (required_before, gradient_before) in zip(after[1], flags_before[1], strict=True):
        assert required == required_before and gradient is gradient_before
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name], name)
    assert_same_bits(logits(model), expected)
