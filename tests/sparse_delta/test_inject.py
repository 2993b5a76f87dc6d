"""`inject` and `eject` with `SparseDeltaConfig`: what is replaced, how many entries train, what is reported, undone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels import SparseDeltaConfig
from peft_kernels.nn import SparseDeltaLinear
from peft_kernels.optim import SparseAdamW

SEVEN = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def adapted(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, SparseDeltaLinear)}


def trainable(model):
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def fingerprint(model):
    """Everything a failed call might have changed."""
    modules = [(path, type(module), id(module)) for path, module in model.named_modules(remove_duplicate=False)]
    parameters = [(name, id(value), value.requires_grad) for name, value in model.named_parameters()]
    return modules, parameters, set(model.__dict__)


def bits(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_state(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("target", [None, "all-linear"])
def test_all_linear_layers_but_the_output(llama, target):
    model = llama()
    report = pk.inject(model, SparseDeltaConfig(density=0.05, target_modules=target))
    layers = adapted(model)
    assert len(layers) == 14 and sorted({path.rpartition(".")[2] for path in layers}) == SEVEN
    assert [layer.path for layer in report.fused] == list(layers)
    assert [(layer.path, layer.reason) for layer in report.left_alone] == [
        ("lm_head", "the output layer, which all-linear leaves out")
    ]
    assert trainable(model) == sorted(f"{path}.values" for path in layers)
    assert report.trainable_parameters == sum(layer.num_deltas for layer in layers.values())
    assert str(report).splitlines()[0] == "InjectionReport: 14 of 15 layers fused"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("selection", ["rigl", "sm3", "random", "magnitude", "fixed"])
def test_injecting_changes_no_output_and_ejecting_restores_the_bits(llama, tokens, dtype, selection):
    model = llama(dtype=dtype)
    expected, before, state = model(tokens).logits, fingerprint(model), bits(model)
    pk.inject(model, SparseDeltaConfig(density=0.05, selection=selection, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(model(tokens).logits, expected)
    optimizer = SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    pk.eject(model, merge=False)
    after = fingerprint(model)
    assert after[1:] == before[1:] and [row[:2] for row in after[0]] == [row[:2] for row in before[0]]
    assert_same_state(model, state)
    assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("merged", [False, True])
def test_ejecting_with_merge_keeps_the_function(llama, tokens, disturb, merged):
    model = llama()
    pk.inject(model, SparseDeltaConfig(density=0.05))
    disturb(model)
    if merged:
        pk.merge(model)
    expected = copy.deepcopy(model)(tokens).logits
    pk.eject(model)
    assert not adapted(model) and all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"density": 0.1}, {"q_proj": 102, "k_proj": 51, "down_proj": 153}),
        ({}, {"q_proj": 10, "k_proj": 5, "down_proj": 15}),
        ({"density": 1e-6}, {"q_proj": 1, "k_proj": 1, "down_proj": 1}),
        ({"density": 1.0}, {"q_proj": 1024, "k_proj": 512, "down_proj": 1536}),
        # 2 x (1024 + 512 + 1536) elements: 61.4 per 1024, and LoRA of rank 1 has 2 x (64 + 48 + 80) parameters.
        ({"num_deltas": 614}, {"q_proj": 102, "k_proj": 51, "down_proj": 153}),
        ({"lora_equivalent_rank": 1}, {"q_proj": 64, "k_proj": 32, "down_proj": 96}),
        ({"num_deltas": 10**6}, {"q_proj": 1024, "k_proj": 512, "down_proj": 1536}),
    ],
)
def test_how_many_entries_train(llama, options, counts):
    model = llama()
    pk.inject(model, SparseDeltaConfig(target_modules=["q_proj", "k_proj", "down_proj"], **options))
    for path, layer in adapted(model).items():
        assert layer.num_deltas == counts[path.rpartition(".")[2]], path


def test_magnitude_takes_the_largest_entries(llama):
    model = llama()
    pk.inject(model, SparseDeltaConfig(density=0.05, selection="magnitude", target_modules=["q_proj"]))
    for layer in adapted(model).values():
        expected = layer.weight.abs().flatten().topk(51).indices.sort().values
        assert torch.equal(layer.indices.long(), expected)


def test_the_seed_makes_the_positions(llama):
    def drawn(seed):
        model = llama()
        pk.inject(model, SparseDeltaConfig(), seed=seed)
        return torch.cat([layer.indices for layer in adapted(model).values()])

    first = drawn(5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(drawn(5), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(drawn(6), first)
    torch.manual_seed(3)
    by_torch = drawn(None)
    torch.manual_seed(3)
    assert torch.equal(drawn(None), by_torch)


@pytest.mark.parametrize("selection", ["rigl", "magnitude", "fixed"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_given_positions_train_instead(llama, selection, dtype):
    model = llama()
    positions = {f"model.layers.{i}.self_attn.q_proj": torch.arange(i, 100 + i, dtype=dtype) for i in range(2)}
    pk.inject(model, SparseDeltaConfig(selection=selection, target_modules=["q_proj"]), positions=positions)
    for path, layer in adapted(model).items():
        assert torch.equal(layer.indices, positions[path].int())


FIRST = "model.layers.0.self_attn.q_proj"


def bad_positions(**changes):
    positions = {FIRST: torch.arange(3), FIRST.replace("0", "1"): torch.arange(3), **changes}
    return {path: value for path, value in positions.items() if value is not None}


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ({}, rf"positions must be given for the adapted layers, each of them, and no other: {FIRST}"),
        (bad_positions(**{FIRST: None}), rf"each of them, and no other: {FIRST}"),
        (bad_positions(lm_head=torch.arange(3)), "each of them, and no other: lm_head"),
        (bad_positions(**{FIRST: torch.tensor([3, 1])}), rf"{FIRST}: indices must be sorted"),
        (bad_positions(**{FIRST: torch.tensor([1, 1])}), rf"{FIRST}: indices must be unique"),
        (bad_positions(**{FIRST: torch.tensor([1, 1024])}), rf"{FIRST}: indices must be in \[0, 1024\), got 1024"),
        (bad_positions(**{FIRST: torch.tensor([1.0])}), rf"{FIRST}: indices must be int32 or int64"),
        (bad_positions(**{FIRST: [1, 2]}), rf"positions must be tensors, got list for {FIRST}"),
    ],
)
def test_bad_positions_are_named_and_change_nothing(llama, positions, message):
    model = llama()
    before = fingerprint(model)
    with pytest.raises((TypeError, ValueError), match=message):
        pk.inject(model, SparseDeltaConfig(target_modules=["q_proj"]), positions=positions)
    assert fingerprint(model) == before


def test_a_tied_weight_is_refused_by_name_and_left_alone_otherwise(llama):
    model = llama(tie_word_embeddings=True)
    before = fingerprint(model)
    with pytest.raises(
        ValueError, match="lm_head: its weight is another module's too, which a delta in it would change"
    ):
        pk.inject(model, SparseDeltaConfig(target_modules=["lm_head", "q_proj"]))
    assert fingerprint(model) == before
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    pair = nn.Sequential(first, second, nn.Linear(8, 8))
    report = pk.inject(pair, SparseDeltaConfig(density=0.5))
    assert list(adapted(pair)) == ["2"]
    assert {row.path for row in report.left_alone} == {"0", "1"}
    assert all("its weight is another module's too" in row.reason for row in report.left_alone)


def test_a_layer_used_at_two_places_stays_one_layer():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": nn.Sequential(shared), "second": nn.Sequential(shared)})
    report = pk.inject(model, SparseDeltaConfig(density=0.5))
    assert model["first"][0] is model["second"][0] and isinstance(model["first"][0], SparseDeltaLinear)
    assert len(report.layers) == 1
    pk.eject(model)
    assert model["first"][0] is model["second"][0] and type(model["first"][0]) is nn.Linear


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("all", 14)])
def test_biases_train_as_asked(llama, bias, count):
    model = llama(attention_bias=True, mlp_bias=True)
    pk.inject(model, SparseDeltaConfig(target_modules=["q_proj"], bias=bias))
    assert sum(name.endswith("bias") for name in trainable(model)) == count


def test_modules_to_save_train_in_full_and_inference_mode_freezes(llama):
    model = llama()
    pk.inject(model, SparseDeltaConfig(modules_to_save=["lm_head"]))
    assert "lm_head.weight" in trainable(model)
    frozen = llama()
    pk.inject(frozen, SparseDeltaConfig(inference_mode=True, bias="all", modules_to_save=["lm_head"]))
    assert trainable(frozen) == []


@pytest.mark.parametrize(("autocast", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_values_dtype(llama, autocast, expected):
    model = llama(dtype=torch.bfloat16)
    pk.inject(model, SparseDeltaConfig(), autocast_adapter_dtype=autocast)
    assert {layer.values.dtype for layer in adapted(model).values()} == {expected}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            SparseDeltaConfig(target_modules=["w1"]),
            r"no layer matches target_modules=\['w1'\].*named down_proj.*v_proj",
        ),
        (SparseDeltaConfig(target_modules=["embed_tokens"]), "embed_tokens: it is a nn.Embedding, not an nn.Linear"),
        (SparseDeltaConfig(modules_to_save=["pooler"]), "modules_to_save names 'pooler'"),
    ],
)
def test_nothing_is_changed_when_injecting_fails(llama, config, message):
    model = llama()
    before = fingerprint(model)
    with pytest.raises((ValueError, TypeError), match=message):
        pk.inject(model, config)
    assert fingerprint(model) == before


def test_an_edited_configuration_is_checked_anew(llama):
    config = SparseDeltaConfig()
    config.density = 7.0
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 7.0"):
        pk.inject(llama(), config)


def test_models_that_are_not_ready_are_refused(llama):
    model = llama()
    pk.inject(model, SparseDeltaConfig())
    for config in (SparseDeltaConfig(), pk.LoraConfig()):
        with pytest.raises(ValueError, match="model has adapters already"):
            pk.inject(model, config)
    with pytest.raises(ValueError, match=r"it is the whole model; use nn\.SparseDeltaLinear\.from_linear"):
        pk.inject(nn.Linear(4, 4), SparseDeltaConfig())


def test_a_weight_in_other_strides_is_left_alone_with_the_reason():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    model[0].weight = nn.Parameter(torch.randn(8, 6).t())
    report = pk.inject(model, SparseDeltaConfig())
    (row,) = report.left_alone
    assert row.path == "0" and row.reason == "its weight is not contiguous (strides [1, 6])"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_an_injected_model_are_injected_and_train_apart(llama, tokens, disturb, copied, tmp_path):
    model = llama()
    pk.inject(model, SparseDeltaConfig(density=0.05))
    disturb(model)
    expected = model(tokens).logits
    twin = copied(model)
    assert torch.equal(twin(tokens).logits, expected)
    twin(input_ids=tokens, labels=tokens).loss.backward()
    SparseAdamW([p for p in twin.parameters() if p.requires_grad], lr=0.1).step()
    assert not torch.equal(twin(tokens).logits, expected)
    assert torch.equal(model(tokens).logits, expected)
    pk.save_adapter(twin, tmp_path)
    pk.eject(twin, merge=False)
    assert_same_state(twin, bits(llama()))
    assert len(adapted(model)) == 14


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_through_transformers_keeps_the_gradients(llama, tokens, disturb, reentrant):
    def gradients(checkpointing):
        model = llama()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        pk.inject(model, SparseDeltaConfig(density=0.05), seed=1)
        disturb(model)
        model.train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == 14
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, msg=name)


def test_the_model_s_own_state_loads_into_the_injected_one(llama, tokens, disturb):
    model, other = llama(), llama(seed=1)
    pk.inject(model, SparseDeltaConfig(density=0.05))
    disturb(model)
    model(tokens)
    result = model.load_state_dict(other.state_dict(), strict=False)
    assert not result.unexpected_keys
    pk.eject(model, merge=False)
    assert_same_state(model, bits(other))


def test_a_weight_that_shares_its_memory_with_another_is_left_alone():
    model = nn.ModuleDict({"embed": nn.Embedding(12, 8), "head": nn.Linear(8, 12, bias=False), "free": nn.Linear(8, 8)})
    model["head"].weight = nn.Parameter(model["embed"].weight.data)
    report = pk.inject(model, pk.SparseDeltaConfig(density=0.1))
    assert [layer.path for layer in report.fused] == ["free"]
    assert "its weight is another module's too" in report.left_alone[0].reason
