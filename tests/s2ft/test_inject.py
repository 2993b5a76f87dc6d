"""`inject` and `eject` with `S2FTConfig`: which heads and channels train, what is reported, moved and moved back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels import S2FTConfig
from peft_kernels.channels import Slice
from peft_kernels.nn import S2FTLinear, SwiGLUMLP
from peft_kernels.nn.s2ft_layer import S2FTLayer
from peft_kernels.optim import SparseAdamW

from .architectures import ARCHITECTURES, build, every_architecture, logits, roles
from .architectures import tokens as batch_of

ALL_ROLES = ("q", "k", "v", "o", "up", "gate", "down")
TYPES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "up": "up_proj", "gate": "gate_proj"}
NAMES = {**TYPES, "down": "down_proj"}
HEAD_DIM = 8


def adapted(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, S2FTLayer)}


def trainable(model):
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def fingerprint(model):
    """Everything a failed call might have changed."""
    modules = [(path, type(module), id(module)) for path, module in model.named_modules(remove_duplicate=False)]
    parameters = [(name, id(value), value.requires_grad) for name, value in model.named_parameters()]
    flags = [module.training for module in model.modules()]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return modules, parameters, flags, hooks, set(model.__dict__)


def bits(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_state(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def train(model, steps=3, lr=0.05, tokens=None):
    tokens = batch_of() if tokens is None else tokens
    optimizer = SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("role", ALL_ROLES)
def test_a_role_trains_whole_heads_or_channels_of_its_layers(llama, role):
    model = llama()
    report = pk.inject(model, S2FTConfig(ratios={role: 0.5}, budget="per_layer"), seed=1)
    layers = adapted(model)
    assert [path.rpartition(".")[2] for path in layers] == [NAMES[role]] * 2
    assert sorted(layer.path for layer in report.fused) == sorted(layers)
    width = HEAD_DIM if role in "qkvo" else 1
    for layer in layers.values():
        assert layer.dim == ("input" if role in ("o", "down") else "output")
        assert layer.num_channels == layer.channels // 2
        heads = layer.indices.view(-1, width)
        assert torch.equal(heads, heads[:, :1] // width * width + torch.arange(width)), "whole heads"
    assert trainable(model) == sorted(f"{path}.trainable" for path in layers)
    assert report.trainable_parameters == sum(layer.trainable.numel() for layer in layers.values())


def test_the_default_trains_heads_of_o_and_channels_of_down(llama):
    model = llama()
    report = pk.inject(model, S2FTConfig(), seed=1)
    # 8 heads of o and 96 channels of down, in two layers together.
    counts = {"o_proj": 0, "down_proj": 0}
    for path, layer in adapted(model).items():
        counts[path.rpartition(".")[2]] += layer.num_channels
    assert counts == {"o_proj": 1 * HEAD_DIM, "down_proj": 2}
    reasons = {row.path: row.reason for row in report.layers}
    assert len(reasons) == 15
    (without,) = {f"model.layers.{i}.self_attn.o_proj" for i in range(2)} - adapted(model).keys()
    assert reasons[without] == "nothing of it was chosen to train"
    assert reasons["lm_head"] == reasons["model.layers.0.self_attn.q_proj"] == "target_modules does not name it"
    assert all(reasons[path] is None for path in adapted(model))


@pytest.mark.parametrize(("budget", "counts"), [("global", None), ("per_layer", [4, 4])])
def test_budgets_count_over_all_layers_or_in_each(llama, budget, counts):
    model = llama()
    pk.inject(model, S2FTConfig(ratios={"down": 0.1}, budget=budget), seed=3)
    found = [layer.num_channels for layer in adapted(model).values()]
    assert sum(found) == (9 if counts is None else 8)
    assert counts is None or found == counts


@pytest.mark.parametrize("dim", ["input", "output"])
@pytest.mark.parametrize("selection", ["random", "weight"])
@pytest.mark.parametrize("largest", [True, False])
def test_target_modules_and_a_ratio_take_single_channels(llama, dim, selection, largest):
    model = llama()
    config = S2FTConfig(target_modules=["q_proj", "up_proj"], ratio=0.25, dim=dim, selection=selection, largest=largest)
    report = pk.inject(model, config, seed=1)
    layers = adapted(model)
    assert len(layers) == len(report.fused) == 4
    for path, layer in layers.items():
        outputs = 32 if path.endswith("q_proj") else 48
        assert layer.dim == dim and layer.num_channels == (8 if dim == "input" else outputs // 4)
        if selection == "weight":
            norms = layer.weight.detach().norm(dim=1 - layer.axis)
            order = norms.sort(descending=largest).indices[: layer.num_channels]
            assert torch.equal(layer.indices, order.sort().values)


@pytest.mark.parametrize("target", [None, "all-linear"])
def test_a_ratio_without_target_modules_takes_all_linear_layers_but_the_output(llama, target):
    model = llama()
    report = pk.inject(model, S2FTConfig(ratio=0.1, target_modules=target))
    assert len(adapted(model)) == 14
    assert [(row.path, row.reason) for row in report.left_alone] == [
        ("lm_head", "the output layer, which all-linear leaves out")
    ]
    assert str(report).splitlines()[0] == "InjectionReport: 14 of 15 layers fused"


def test_target_modules_narrow_the_layers_of_the_roles(llama):
    model = llama()
    pk.inject(model, S2FTConfig(ratios={"o": 0.5, "down": 0.5}, target_modules=r".*1\..*\.(o|down)_proj"), seed=1)
    assert sorted(adapted(model)) == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    excluded = llama()
    first = "model.layers.0.self_attn.o_proj"
    report = pk.inject(excluded, S2FTConfig(ratios={"o": 1.0, "down": 1.0}, exclude_modules=["0.self_attn.o_proj"]))
    assert len(adapted(excluded)) == 3 and first not in adapted(excluded)
    assert {row.path: row.reason for row in report.left_alone}[first] == "exclude_modules names it"


def test_the_seed_makes_the_choice(llama):
    def drawn(by, **options):
        model = llama()
        pk.inject(model, S2FTConfig(**{"ratios": {"o": 0.5, "up": 0.3, "down": 0.3}, **options}), seed=by)
        return {path: layer.indices.tolist() for path, layer in adapted(model).items()}

    paca = {"ratios": None, "ratio": 0.3, "target_modules": ["q_proj"]}
    for options in ({}, paca):
        first = drawn(5, **options)
        torch.manual_seed(1)
        state = torch.get_rng_state()
        assert drawn(5, **options) == first
        assert torch.equal(torch.get_rng_state(), state)
        assert drawn(6, **options) != first
        assert drawn(6, seed=5, **options) == drawn(7, seed=5, **options), "the configuration's comes first"
        torch.manual_seed(3)
        by_torch = drawn(None, **options)
        torch.manual_seed(3)
        assert drawn(None, **options) == by_torch


@pytest.mark.parametrize("selection", ["activation", "weight_activation", "gradient"])
@pytest.mark.parametrize("largest", [True, False])
def test_calibration_chooses_by_what_the_batches_say(llama, tokens, selection, largest):
    model = llama()
    batches = [{"input_ids": part[None], "labels": part[None]} for part in tokens]
    statistics = {}
    structure = pk.channels.find_structure(model)
    if selection == "gradient":
        statistics["gradients"] = pk.channels.collect_gradients(model, batches, structure)
    else:
        statistics["activations"] = pk.channels.collect_activations(model, batches, structure)
    ratios = {"o": 0.5, "down": 0.2}
    expected = pk.channels.select(model, ratios, selection=selection, largest=largest, **statistics).slices
    before = [parameter.grad for parameter in model.parameters()]
    pk.inject(model, S2FTConfig(ratios=ratios, selection=selection, largest=largest), calibration=iter(batches))
    found = adapted(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(layer.indices, expected[path].indices) for path, layer in found.items())
    assert model.training and all(grad is None for grad in before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_given_slices_train_instead(llama):
    model = llama()
    positions = {
        "model.layers.0.mlp.down_proj": Slice(torch.tensor([3, 7]), "input"),
        "model.layers.1.mlp.down_proj": Slice(torch.tensor([0]), "output"),
    }
    report = pk.inject(model, S2FTConfig(ratio=0.5, target_modules=["down_proj", "up_proj"]), positions=positions)
    layers = adapted(model)
    assert layers.keys() == positions.keys() and len(report.fused) == 2
    for path, part in positions.items():
        assert torch.equal(layers[path].indices, part.indices) and layers[path].dim == part.dim


FIRST = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ({"lm_head": Slice(torch.arange(2), "input")}, "positions must be given for adapted layers only: lm_head"),
        ({FIRST: torch.arange(2)}, rf"positions must be channels.Slice objects, got Tensor for {FIRST}"),
        ({FIRST: Slice(torch.tensor([48]), "input")}, rf"{FIRST}: indices must be in \[0, 48\), got 48"),
        ({FIRST: Slice(torch.tensor([32]), "output")}, rf"{FIRST}: indices must be in \[0, 32\), got 32"),
    ],
)
@pytest.mark.parametrize("co_permute", [False, True])
def test_bad_slices_are_named_and_change_nothing(llama, positions, message, co_permute):
    model = llama()
    before, state = fingerprint(model), bits(model)
    config = S2FTConfig(ratios={"down": 0.5}, co_permute=co_permute)
    with pytest.raises((TypeError, ValueError), match=message):
        pk.inject(model, config, positions=positions)
    assert fingerprint(model) == before
    assert_same_state(model, state)


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_co_permuting_changes_no_function_and_ejecting_restores_the_bits(name, dtype):
    model = build(name, dtype)
    expected, before, state = logits(model), fingerprint(model), bits(model)
    present = roles(name)
    config = S2FTConfig(ratios=dict.fromkeys(present, 0.34), co_permute=True, budget="per_layer")
    pk.inject(model, config, seed=2)
    layers = adapted(model)
    assert {path for path in present.values()} <= layers.keys()
    fused = {path for path in present.values() if list(present.values()).count(path) > 1}
    for path, layer in layers.items():
        if not any(path.endswith(other.removeprefix(ARCHITECTURES[name].prefix)) for other in fused):
            assert int(layer.indices[-1] - layer.indices[0]) == layer.num_channels - 1, f"{path} is not contiguous"
    assert any(not torch.equal(value, state[key]) for key, value in model.state_dict().items() if key in state)
    tolerance = {torch.float64: 1e-10, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(logits(model), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    losses = train(model.train(), lr=0.02)
    model.eval()
    assert losses[-1] < losses[0]
    trained = logits(model)
    kept = copy.deepcopy(model)
    pk.eject(model, merge=False)
    after = fingerprint(model)
    assert after[1:] == before[1:] and [row[:2] for row in after[0]] == [row[:2] for row in before[0]]
    assert_same_state(model, state)
    assert torch.equal(logits(model), expected)
    pk.eject(kept, merge=True)
    torch.testing.assert_close(logits(kept), trained, rtol=tolerance, atol=tolerance * float(trained.abs().max()))
    assert not torch.allclose(logits(kept), expected, rtol=1e-3)


@every_architecture
def test_co_permuted_training_is_training_in_place(name):
    results = []
    for co_permute in (False, True):
        model = build(name)
        # What is drawn for coupled layers differs from what is drawn apart, so both get the same slices.
        chosen = pk.channels.select(model, dict.fromkeys(roles(name), 0.34), seed=3, coupled=True)
        config = S2FTConfig(ratios=dict.fromkeys(roles(name), 0.34), co_permute=co_permute)
        pk.inject(model, config, positions=chosen.slices)
        losses = train(model, 4, lr=0.02)
        pk.eject(model, merge=True)
        results.append((torch.tensor(losses), bits(model)))
    (losses, plain), (permuted_losses, permuted) = results
    torch.testing.assert_close(permuted_losses, losses, rtol=1e-9, atol=0)
    assert losses[-1] < losses[0]
    for key, value in plain.items():
        # Where a gradient is zero but for rounding, its sign decides a step of Adam.
        torch.testing.assert_close(permuted[key], value, rtol=1e-6, atol=1e-6, msg=key)


@every_architecture
def test_injecting_changes_no_function_on_any_architecture(name):
    model = build(name)
    expected, state = logits(model), bits(model)
    report = pk.inject(model, S2FTConfig(ratios=dict.fromkeys(roles(name), 0.34), budget="per_layer"), seed=2)
    assert set(roles(name).values()) <= adapted(model).keys() and len(report.fused) == len(adapted(model))
    torch.testing.assert_close(logits(model), expected, rtol=1e-12, atol=1e-12)
    losses = train(model.train(), lr=0.02)
    assert losses[-1] < losses[0]
    pk.eject(model, merge=False)
    assert_same_state(model, state)


def test_grouped_queries_keep_their_groups(llama):
    model = llama()
    expected = logits(model, input_ids=batch_of())
    pk.inject(model, S2FTConfig(ratios=dict.fromkeys("qkvo", 0.5), co_permute=True, budget="per_layer"), seed=4)
    for i in range(2):
        q, k, v, o = (model.get_submodule(f"model.layers.{i}.self_attn.{role}_proj") for role in "qkvo")
        # One of two key-value heads, with both of its query heads, at the front of each layer.
        assert k.indices.tolist() == v.indices.tolist() == list(range(HEAD_DIM))
        assert q.indices.tolist() == o.indices.tolist() == list(range(2 * HEAD_DIM))
    torch.testing.assert_close(logits(model, input_ids=batch_of()), expected, rtol=1e-4, atol=1e-5)


def test_a_role_that_the_model_does_not_have_is_refused():
    model = build("phi")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="gate"):
        pk.inject(model, S2FTConfig(ratios={"gate": 0.5}))
    with pytest.raises(ValueError, match="ratios asks for gate, but layers have none"):
        pk.inject(model, S2FTConfig(ratios={"gate": 0.5, "down": 0.5}))
    with pytest.raises(ValueError, match=r"the model has no layers for the roles down: 0: a nn\.Linear outside of"):
        pk.inject(nn.Sequential(nn.Linear(4, 4)), S2FTConfig(ratios={"down": 0.5}))
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (S2FTConfig(ratio=0.1, target_modules=["w1"]), r"no layer matches target_modules=\['w1'\].*named down_proj"),
        (S2FTConfig(ratio=0.1, target_modules=["embed_tokens"]), "embed_tokens: it is a nn.Embedding, not an nn.L"),
        (S2FTConfig(modules_to_save=["pooler"]), "modules_to_save names 'pooler'"),
        (S2FTConfig(selection="activation"), "selection='activation' needs batches as calibration, got None"),
        (S2FTConfig(selection="gradient", co_permute=True), "selection='gradient' needs batches as calibration"),
        (S2FTConfig(ratios={"down": 0.5}, target_modules=["lm_head"]), "ratios asks for down, but layers have none"),
        (S2FTConfig(ratios={"down": 0.5}, exclude_modules=["down_proj"]), "exclude_modules and .* leave no"),
    ],
)
def test_nothing_is_changed_when_injecting_fails(llama, config, message):
    model = llama()
    before, state = fingerprint(model), bits(model)
    with pytest.raises((ValueError, TypeError), match=message):
        pk.inject(model, config)
    assert fingerprint(model) == before
    assert_same_state(model, state)


@pytest.mark.parametrize("bad", [[], [{"input_ids": batch_of()}]], ids=["none", "no labels"])
@pytest.mark.parametrize("co_permute", [False, True])
def test_bad_calibration_changes_nothing(llama, bad, co_permute):
    model = llama().train()
    before, state = fingerprint(model), bits(model)
    with pytest.raises(ValueError, match="batches must hold"):
        pk.inject(model, S2FTConfig(selection="gradient", co_permute=co_permute), calibration=bad)
    assert fingerprint(model) == before
    assert_same_state(model, state)


@pytest.mark.parametrize("stage", ["S2FTLinear.over", "_swiglu_mlps", "_order_of"])
def test_channels_move_back_when_a_later_step_fails(llama, monkeypatch, stage):
    from peft_kernels.families import s2ft

    def out_of_memory(*args, **kwargs):
        raise MemoryError("no memory left")

    if stage == "S2FTLinear.over":
        monkeypatch.setattr(S2FTLinear, "over", out_of_memory)
    else:
        monkeypatch.setattr(s2ft, stage, out_of_memory)
    model = llama()
    before, state = fingerprint(model), bits(model)
    with pytest.raises(MemoryError):
        pk.inject(model, S2FTConfig(ratios={"o": 0.5, "down": 0.5}, co_permute=True), seed=1)
    assert fingerprint(model) == before
    assert_same_state(model, state)


BAD_CONFIGS = [
    ({"ratio": 0.1, "ratios": {"down": 0.1}}, "give ratios or ratio, got both"),
    ({"target_modules": ["q_proj"]}, "target_modules needs ratio, or ratios by role, got neither"),
    ({"ratios": {}}, "ratios must map roles to shares"),
    ({"ratios": [0.1]}, "ratios must map roles to shares"),
    ({"ratios": {"fc": 0.1}}, "ratios must have keys of q, k, v, o, up, gate, down, got 'fc'"),
    *(({"ratios": {"o": share}}, r"ratios\['o'\] must be in \(0, 1\], got") for share in (0, 1.1, float("nan"), True)),
    *(({"ratio": share}, r"ratio must be in \(0, 1\], got") for share in (0.0, -1, 2, "0.1", True)),
    ({"selection": "best"}, "selection must be one of random, weight, .*got 'best'"),
    ({"budget": "all"}, "budget must be one of global, per_layer, got 'all'"),
    ({"ratio": 0.1, "dim": "rows"}, "dim must be one of input, output, got 'rows'"),
    *(({name: 1}, f"{name} must be True or False, got 1") for name in ("largest", "co_permute", "fuse_swiglu")),
    *(({"seed": seed}, "seed must be an integer of at least 0, got") for seed in (-1, 1.0, True)),
    ({"ratio": 0.1, "selection": "activation"}, "selection='activation' needs ratios"),
    ({"ratio": 0.1, "co_permute": True}, "co_permute needs ratios, which say how layers are coupled"),
    ({"bias": "lora_only"}, "bias must be 'none' or 'all', got 'lora_only'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CONFIGS)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        S2FTConfig(**options)


def test_an_edited_configuration_is_checked_anew(llama):
    config = S2FTConfig()
    config.ratios["o"] = 7.0
    with pytest.raises(ValueError, match=r"ratios\['o'\] must be in \(0, 1\], got 7.0"):
        pk.inject(llama(), config)


def test_the_configuration_goes_through_its_file_form():
    config = S2FTConfig(ratios={"o": 0.1}, selection="weight", largest=False, seed=3, co_permute=True)
    values = config.to_dict()
    assert values["peft_type"] == "S2FT" and S2FTConfig.from_dict(values) == config
    with pytest.raises(ValueError, match="peft_type must be 'S2FT' for a S2FTConfig, got 'LORA'"):
        S2FTConfig.from_dict({**values, "peft_type": "LORA"})


def test_models_that_are_not_ready_are_refused(llama):
    model = llama()
    pk.inject(model, S2FTConfig())
    for config in (S2FTConfig(), pk.LoraConfig()):
        with pytest.raises(ValueError, match="model has adapters already"):
            pk.inject(model, config)
    with pytest.raises(ValueError, match=r"it is the whole model; use nn\.S2FTLinear\.from_linear"):
        pk.inject(nn.Linear(4, 4), S2FTConfig(ratio=0.5))


def test_a_tied_weight_is_refused_by_name_and_left_alone_otherwise(llama):
    model = llama(tie_word_embeddings=True)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="lm_head: its weight is another module's too, which a slice in it would"):
        pk.inject(model, S2FTConfig(ratio=0.1, target_modules=["lm_head", "q_proj"]))
    assert fingerprint(model) == before
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    pair = nn.Sequential(first, second, nn.Linear(8, 8))
    report = pk.inject(pair, S2FTConfig(ratio=0.5))
    assert list(adapted(pair)) == ["2"]
    assert {row.path for row in report.left_alone} == {"0", "1"}
    assert all("its weight is another module's too" in row.reason for row in report.left_alone)


def test_a_layer_used_at_two_places_stays_one_layer():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": nn.Sequential(shared), "second": nn.Sequential(shared)})
    report = pk.inject(model, S2FTConfig(ratio=0.5))
    assert model["first"][0] is model["second"][0] and isinstance(model["first"][0], S2FTLinear)
    assert len(report.layers) == 1
    pk.eject(model)
    assert model["first"][0] is model["second"][0] and type(model["first"][0]) is nn.Linear


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("all", 14)])
def test_biases_train_as_asked(llama, bias, count):
    model = llama(attention_bias=True, mlp_bias=True)
    pk.inject(model, S2FTConfig(bias=bias))
    assert sum(name.endswith("bias") for name in trainable(model)) == count


def test_modules_to_save_train_in_full_and_inference_mode_freezes(llama):
    model = llama()
    pk.inject(model, S2FTConfig(modules_to_save=["lm_head"]))
    assert "lm_head.weight" in trainable(model)
    frozen = llama()
    pk.inject(frozen, S2FTConfig(inference_mode=True, bias="all", modules_to_save=["lm_head"]))
    assert trainable(frozen) == []


@pytest.mark.parametrize(("autocast", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_slice_s_dtype(llama, autocast, expected):
    model = llama(dtype=torch.bfloat16)
    pk.inject(model, S2FTConfig(), autocast_adapter_dtype=autocast)
    assert {layer.trainable.dtype for layer in adapted(model).values()} == {expected}


@pytest.mark.parametrize("co_permute", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_ejecting_with_merge_keeps_the_function(llama, tokens, disturb, merged, co_permute):
    model = llama()
    pk.inject(model, S2FTConfig(ratios={"o": 0.5, "down": 0.1}, co_permute=co_permute), seed=1)
    disturb(model)
    if merged:
        pk.merge(model)
    expected = copy.deepcopy(model)(tokens).logits
    pk.eject(model)
    assert not adapted(model) and all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, SwiGLUMLP) for module in model.modules())
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("co_permute", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_an_injected_model_are_injected_and_train_apart(llama, tokens, disturb, copied, co_permute, tmp_path):
    model = llama()
    pk.inject(model, S2FTConfig(ratios={"o": 0.5, "down": 0.1}, co_permute=co_permute), seed=1)
    disturb(model)
    expected = model(tokens).logits
    twin = copied(model)
    assert torch.equal(twin(tokens).logits, expected)
    train(twin, 1, lr=0.1, tokens=tokens)
    assert not torch.equal(twin(tokens).logits, expected)
    assert torch.equal(model(tokens).logits, expected)
    pk.save_adapter(twin, tmp_path)
    pk.eject(twin, merge=False)
    assert_same_state(twin, bits(llama()))
    assert adapted(model)
    pk.eject(model, merge=False)
    assert_same_state(model, bits(llama()))


def test_the_model_s_own_state_loads_into_the_injected_one(llama, tokens, disturb):
    model, other = llama(), llama(seed=1)
    pk.inject(model, S2FTConfig())
    disturb(model)
    model(tokens)
    result = model.load_state_dict(other.state_dict(), strict=False)
    assert not result.unexpected_keys
    pk.eject(model, merge=False)
    assert_same_state(model, bits(other))


def test_the_state_of_a_model_whose_channels_lie_otherwise_is_refused(llama, tokens, disturb):
    model = llama()
    pk.inject(model, S2FTConfig(ratios={"o": 0.5, "down": 0.5}, budget="per_layer", co_permute=True), seed=1)
    disturb(model)
    expected, state = model(tokens).logits, copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"o_proj.weight: the layer's channels have moved \(co_permute\)"):
        model.load_state_dict(llama().state_dict(), strict=False)
    twin = llama()
    pk.inject(twin, S2FTConfig(ratios={"o": 0.5, "down": 0.5}, budget="per_layer", co_permute=True), seed=1)
    twin.load_state_dict(state)
    assert torch.equal(twin(tokens).logits, expected)
    pk.eject(twin, merge=False)
    assert_same_state(twin, bits(llama()))


def test_both_dims_of_an_odd_model_train():
    # No transformer: layers are known by name, and both kinds of channels train in one model.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5))
    parts = {"0": Slice(torch.tensor([1, 4, 12]), "output"), "2": Slice(torch.tensor([0, 12]), "input")}
    pk.inject(model, S2FTConfig(ratio=0.5), positions=parts)
    before = bits(model)
    x = torch.randn(9, 7)
    model(x).square().sum().backward()
    SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    changed = (model[0].weight != before["0.weight"]).any(1), (model[2].weight != before["2.weight"]).any(0)
    assert changed[0].nonzero().flatten().tolist() == [1, 4, 12]
    assert changed[1].nonzero().flatten().tolist() == [0, 12]


def test_ejecting_is_refused_before_anything_changes_where_channels_cannot_move_back(llama):
    model = llama()
    pk.inject(model, S2FTConfig(ratios={"down": 0.3}, co_permute=True, budget="per_layer"), seed=4)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = nn.Identity()  # its channels have moved, and it is gone
    before = adapted(model).keys()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj cannot be permuted"):
        pk.eject(model, merge=False)
    assert adapted(model).keys() == before


def test_batches_that_nothing_goes_by_are_refused(llama):
    model = llama()
    for config in (S2FTConfig(ratios={"down": 0.5}), pk.LoraConfig(r=2)):
        with pytest.raises(ValueError, match="calibration must be None"):
            pk.inject(model, config, calibration=[{"input_ids": torch.tensor([[1, 2]])}])


def test_an_optimizer_leaves_ejected_layers_alone(llama, tokens):
    model = llama()
    before = bits(model)
    pk.inject(model, S2FTConfig(ratios={"down": 0.5}), seed=1)
    layers = list(adapted(model).values())
    optimizer = pk.optim.SparseAdamW([layer.trainable for layer in layers], lr=0.1)
    model(tokens).logits.sum().backward()
    pk.eject(model, merge=False)
    optimizer.step()
    assert_same_state(model, before)
