"""Co-permutation: the model's function stays, what trains comes together, bits come back; else nothing is changed."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from peft_kernels.channels import ROLES, Slice, co_permute, find_structure, permutation, select
from peft_kernels.channels.orders import head_order, order_of

from ..support.accuracy import assert_same_bits
from .architectures import ARCHITECTURES, build, every_architecture, from_config, logits, matrix, state, tokens

EVERYTHING = {"q": 0.3, "k": 0.5, "v": 0.9, "o": 0.7, "up": 0.5, "gate": 0.2, "down": 0.3}
"""Nested, when coupled."""


def chosen_in(model, structure, ratios=EVERYTHING, **options):
    ratios = {role: ratio for role, ratio in ratios.items() if structure.units(role)}
    return select(model, ratios, structure=structure, **{"seed": 0, "coupled": True, **options}).slices


def assert_state(model, expected):
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, expected[name], name)


def trained(model, path, part):
    """The slice of the weight, `[N, s]` or `[s, K]`."""
    weight = matrix(model, path)
    return weight[:, part.indices] if part.dim == "input" else weight[part.indices]


def every_slice(model, slices):
    return {path: trained(model, path, part).clone() for path, part in slices.items()}


def by_channel(values, part):
    """The numbers of each channel, in an order that does not depend on where it is."""
    return sorted((values if part.dim == "output" else values.t()).tolist())


@every_architecture
@pytest.mark.parametrize("ratios", [{"o": 0.5, "down": 0.2}, {"v": 0.4, "up": 0.1}, EVERYTHING])
@pytest.mark.parametrize("coupled", [True, False])
def test_the_function_stays_and_undoing_restores_bits(name, ratios, coupled):
    model = build(name)
    structure = find_structure(model)
    slices = chosen_in(model, structure, ratios, coupled=coupled)
    before, expected = state(model), logits(model)
    done = co_permute(model, slices, structure)
    moved = logits(model)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert float((moved - expected).abs().max()) <= 1e-12 * max(1.0, float(expected.abs().max()))
    assert list(done.slices) == list(slices)
    assert all(part.indices.numel() == slices[path].indices.numel() for path, part in done.slices.items())
    done.undo(model)
    assert_state(model, before)


def last_units(structure):
    """The last head of each role, and the last channel."""
    slices = {}
    for role in ROLES:
        for of in structure.units(role):
            last = of.first + (of.count - 1) * of.width + torch.arange(of.width)
            earlier = slices[of.path].indices if of.path in slices else last[:0]
            slices[of.path] = Slice(torch.cat((earlier, last)).sort().values, of.dim)
    return slices


@every_architecture
def test_every_layer_has_to_move(name):
    """What the test above would not see if a layer, or its bias, stayed where it is."""
    model = build(name)
    structure = find_structure(model)
    before, expected = state(model), logits(model)
    done = co_permute(model, last_units(structure), structure)
    assert float((logits(model) - expected).abs().max()) <= 1e-12
    moved = state(model)
    changed = {key for key, tensor in moved.items() if not torch.equal(tensor, before[key])}
    paths = {units.path for role in ROLES for units in structure.units(role)}
    if ARCHITECTURES[name].heads[1] == 1:  # one group stays where it is
        paths -= {path for path in paths if path.endswith(("k_proj", "v_proj"))}
    assert {key.rpartition(".")[0] for key in changed} == paths <= set(done.orders)
    if name == "opt":  # without rotary embeddings, a bias of the keys does nothing
        changed -= {key for key in changed if key.endswith("k_proj.bias")}
    for key in changed:
        model.state_dict()[key].copy_(before[key])
        assert float((logits(model) - expected).abs().max()) > 1e-6, key
        model.state_dict()[key].copy_(moved[key])


@every_architecture
@pytest.mark.parametrize("budget", ["global", "per_layer"])
def test_coupled_channels_become_ranges(name, budget):
    model = build(name)
    structure = find_structure(model)
    for ratios in (EVERYTHING, {"k": 0.5, "down": 0.3}, {"v": 0.5, "o": 0.5, "up": 0.2, "down": 0.2}):
        slices = chosen_in(model, structure, ratios, budget=budget)
        done = co_permute(model, slices, structure)
        for path, part in done.slices.items():
            roles = structure.roles()[path]
            if len(set(roles) & set(ratios)) == 1:
                assert part.contiguous, path
            else:  # a fused layer has a range for each of its roles
                runs = 1 + int((part.indices.diff() > 1).sum())
                assert runs <= len(roles), path
        if "k" in ratios and "q" not in ratios:
            assert done.contiguous
        done.undo(model)


@every_architecture
def test_what_trains_is_the_same_part_of_the_weight(name):
    model = build(name)
    structure = find_structure(model)
    for coupled in (True, False):
        slices = chosen_in(model, structure, coupled=coupled)
        before = every_slice(model, slices)
        done = co_permute(model, slices, structure)
        for path, after in every_slice(model, done.slices).items():
            # Rows of o and down stay where they are, and so do the columns of the others.
            assert by_channel(before[path], slices[path]) == by_channel(after, slices[path]), path
        done.undo(model)


@pytest.mark.parametrize("name", ["llama-grouped", "gpt2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bits_come_back_in_every_dtype(name, dtype):
    model = build(name, dtype)
    before = state(model)
    done = co_permute(model, chosen_in(model, find_structure(model)))
    done.undo(model)
    assert_state(model, before)


def test_training_in_between_does_not_matter():
    model, other = build("llama-grouped"), build("llama-grouped")
    slices = chosen_in(model, find_structure(model), {"o": 0.5, "down": 0.2})
    done = co_permute(model, slices)
    for path, part in slices.items():
        change = torch.randn(24, part.indices.numel(), dtype=torch.float64)
        other.get_submodule(path).weight.data[:, part.indices] += change
        now = done.orders[path].columns.argsort()[part.indices]
        assert_same_bits(now.sort().values, done.slices[path].indices)
        model.get_submodule(path).weight.data[:, now] += change
    assert float((logits(model) - logits(other)).abs().max()) <= 1e-12
    done.undo(model)
    assert_state(model, state(other))


def test_gradients_move_along():
    for name in ("llama-grouped", "gpt2"):
        model = build(name)
        ids = tokens()
        model(input_ids=ids, labels=ids).loss.backward()
        before = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
        done = co_permute(model, chosen_in(model, find_structure(model)))
        moved = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
        assert any(not torch.equal(moved[key], before[key]) for key in before)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(moved[key], parameter.grad, rtol=1e-9, atol=1e-12)
        for key, parameter in model.named_parameters():
            parameter.grad.copy_(moved[key])
        done.undo(model)
        for key, parameter in model.named_parameters():
            assert_same_bits(parameter.grad, before[key], key)


def test_blocks_without_slices_stay():
    model = build("llama-grouped")
    before = state(model)
    path = "model.layers.1.mlp.down_proj"
    empty = Slice(torch.empty(0, dtype=torch.int64), "input")
    done = co_permute(model, {path: Slice(torch.tensor([7, 30]), "input"), "model.layers.0.mlp.down_proj": empty})
    assert done.slices[path].indices.tolist() == [0, 1]
    assert done.slices["model.layers.0.mlp.down_proj"].indices.numel() == 0
    assert set(done.orders) == {f"model.layers.1.mlp.{name}_proj" for name in ("up", "gate", "down")}
    for name, tensor in model.state_dict().items():
        if "layers.1.mlp" not in name:
            assert_same_bits(tensor, before[name], name)
    assert co_permute(model, {}).orders == {}


def test_channels_within_a_head_keep_their_places_in_it():
    model = build("llama-grouped")  # three groups of two heads of four channels
    expected = logits(model)
    path = "model.layers.0.self_attn.o_proj"
    indices = torch.tensor([13, 14, 18, 19])  # in heads 3 and 4, of groups 1 and 2
    values = trained(model, path, Slice(indices, "input"))
    done = co_permute(model, {path: Slice(indices, "input")})
    part = done.slices[path]
    assert sorted((part.indices % 4).tolist()) == sorted((indices % 4).tolist())
    assert by_channel(trained(model, path, part), part) == by_channel(values, part)
    # The heads now lie side by side, although in different groups.
    heads = (part.indices // 4).unique()
    assert int(heads[1] - heads[0]) == 1
    assert float((logits(model) - expected).abs().max()) <= 1e-12


@pytest.mark.parametrize("name", ["llama-grouped", "phi3", "gpt2"])
def test_any_channels_whatever(name):
    model = build(name)
    structure = find_structure(model)
    before, expected = state(model), logits(model)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        slices = {}
        for role in ROLES:
            for of in structure.units(role):
                if torch.rand((), generator=generator) < 0.5:
                    size = matrix(model, of.path).shape[0 if of.dim == "output" else 1]
                    mask = torch.rand(size, generator=generator) < torch.rand((), generator=generator)
                    slices[of.path] = Slice(mask.nonzero().flatten(), of.dim)
        values = every_slice(model, slices)
        done = co_permute(model, slices, structure)
        assert float((logits(model) - expected).abs().max()) <= 1e-12
        for path, after in every_slice(model, done.slices).items():
            assert by_channel(values[path], slices[path]) == by_channel(after, slices[path]), path
        done.undo(model)
        assert_state(model, before)


def runs_of(mask):
    return int((torch.cat((torch.zeros(1, dtype=torch.bool), mask)).int().diff() == 1).sum())


@pytest.mark.parametrize(("groups", "size"), [(1, 3), (3, 2), (2, 3), (4, 2)])
def test_chosen_heads_have_as_few_runs_as_groups_allow(groups, size):
    """Against every order that keeps groups together."""
    every_order = [
        torch.tensor([g * size + h for g, inner in zip(outer, inners, strict=True) for h in inner])
        for outer in itertools.permutations(range(groups))
        for inners in itertools.product(itertools.permutations(range(size)), repeat=groups)
    ]
    every = torch.stack(every_order)
    for bits in itertools.product([False, True], repeat=groups * size):
        mask = torch.tensor(bits)
        found = head_order([mask], [], size)
        assert found.query.sort().values.tolist() == list(range(groups * size))
        assert torch.equal(found.query.view(groups, size) // size, found.key_value[:, None].expand(groups, size))
        padded = nn.functional.pad(mask[every].int(), (1, 0))
        fewest = int((padded.diff(dim=1) == 1).sum(1).min())
        assert runs_of(mask[found.query]) == fewest, bits


@pytest.mark.parametrize("size", [1, 2, 5])
def test_nested_and_two_sets_become_ranges(size):
    for bits in itertools.product([False, True], repeat=2 * size):
        first, second = torch.tensor(bits[:size]), torch.tensor(bits[size:])
        for sets in ([first, second], [first & second, first, first | second]):
            order = order_of(sets)
            assert order.sort().values.tolist() == list(range(size))
            assert all(runs_of(mask[order]) <= 1 for mask in sets)
        # Nested sets come first of all.
        nested = order_of([first & second, first])
        count = int((first & second).sum())
        assert bool((first & second)[nested][:count].all())


def test_chosen_groups_of_keys_and_values_come_before_others():
    query = torch.tensor([True, False, False, False, True, True, False, True])  # four groups of two
    key_value = torch.tensor([False, False, False, True])
    found = head_order([query], [key_value], 2)
    assert found.key_value.tolist()[0] == 3
    assert torch.equal(found.query.view(4, 2) // 2, found.key_value[:, None].expand(4, 2))


OPTIONS = ARCHITECTURES["llama"].options


def gpt_oss():
    options = ARCHITECTURES["qwen3"].options | {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size": 40,
    }
    return from_config("GptOssConfig", torch.float32, **options)


def tied_to_another_layer():
    model = build("llama")
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    return model


def tied_by_memory():
    model = build("llama")
    memory = torch.randn(2 * 39 * 24, dtype=torch.float64)
    for number, mlp in enumerate((model.model.layers[0].mlp, model.model.layers[1].mlp)):
        mlp.up_proj.weight = nn.Parameter(memory[number * 100 :][: 39 * 24].view(39, 24))
    return model


def on_meta():
    model = build("llama")
    model.model.layers[1].mlp.gate_proj.weight = nn.Parameter(torch.empty(39, 24, device="meta", dtype=torch.float64))
    return model


def repeated():
    model = build("llama")
    model.model.layers[1].mlp.gate_proj.weight = nn.Parameter(torch.randn(39, 1, dtype=torch.float64).expand(39, 24))
    return model


def positioned():
    model = build("llama")

    def forward(hidden_states, alibi=None, **arguments):
        raise NotImplementedError

    model.model.layers[1].self_attn.forward = forward
    return model


@pytest.mark.parametrize(
    ("make", "ratios", "message"),
    [
        (gpt_oss, {"o": 0.5}, r"self_attn\.sinks \[4\] may belong to heads by their numbers.* \(and|sinks"),
        (lambda: from_config("Olmo2Config", **OPTIONS), {"v": 0.5}, r"q_norm\.weight \[24\] may belong to heads"),
        (lambda: from_config("BitNetConfig", **OPTIONS), {"down": 0.5}, r"ffn_sub_norm\.weight \[39\] may belong to"),
        (positioned, {"o": 1.0}, "model.layers.1.self_attn takes alibi, which belongs to heads by their numbers"),
        (tied_to_another_layer, {"down": 1.0}, r"layers\.0\.mlp\.down_proj\.weight is tied to model\.layers\.1"),
        (tied_by_memory, {"down": 1.0}, r"layers\.0\.mlp\.up_proj\.weight is tied to model\.layers\.1"),
        (on_meta, {"up": 1.0}, "mlp.gate_proj cannot be permuted: its weight is on the meta device"),
        (repeated, {"up": 1.0}, "mlp.gate_proj cannot be permuted: its weight repeats the same memory"),
    ],
)
def test_models_that_forbid_it_are_refused_before_anything_changes(make, ratios, message):
    model = make()
    structure = find_structure(model)
    slices = select(model, ratios, seed=0, structure=structure).slices
    before = state(model)
    with pytest.raises(ValueError, match=message):
        co_permute(model, slices, structure)
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta:
            assert_same_bits(tensor, before[name], name)


def test_weights_that_are_tied_elsewhere_do_not_matter():
    model = build("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = logits(model)
    co_permute(model, chosen_in(model, find_structure(model)))
    assert float((logits(model) - expected).abs().max()) <= 1e-12


def test_weights_side_by_side_in_memory_are_not_tied():
    model = build("llama")
    memory = torch.randn(2 * 39 * 24, dtype=torch.float64)
    for part, mlp in zip(memory.split(39 * 24), (of.mlp for of in model.model.layers), strict=True):
        mlp.up_proj.weight = nn.Parameter(part.view(39, 24))
    expected = logits(model)
    co_permute(model, chosen_in(model, find_structure(model)))
    assert float((logits(model) - expected).abs().max()) <= 1e-12


def test_a_block_that_is_used_twice_moves_once():
    model = build("llama")
    model.model.layers[1] = model.model.layers[0]
    expected = logits(model)
    co_permute(model, chosen_in(model, find_structure(model)))
    assert float((logits(model) - expected).abs().max()) <= 1e-12


@pytest.mark.parametrize(
    ("path", "indices", "dim", "message"),
    [
        ("lm_head", [0], "input", "slices must name layers of attention blocks or MLPs, but 'lm_head' is none"),
        ("nowhere", [0], "input", "but 'nowhere' is none"),
        ("model.layers.1.mlp.down_proj", [0], "output", "must have dim='input', got 'output'"),
        ("model.layers.1.mlp.up_proj", [0], "input", "must have dim='output', got 'input'"),
        ("model.layers.1.mlp.down_proj", [0, 39], "input", "must have indices below 39, got 39"),
        ("model.layers.1.self_attn.k_proj", [12], "output", "must have indices below 12, got 12"),
    ],
)
def test_bad_slices_are_refused_before_anything_changes(path, indices, dim, message):
    model = build("llama-grouped")
    before = state(model)
    slices = {
        "model.layers.0.mlp.down_proj": Slice(torch.tensor([3]), "input"),
        path: Slice(torch.tensor(indices), dim),
    }
    with pytest.raises(ValueError, match=message):
        co_permute(model, slices)
    assert_state(model, before)


def test_a_failure_half_way_puts_back_what_was_done(monkeypatch):
    model = build("phi")
    before = state(model)
    slices = chosen_in(model, find_structure(model))
    original, calls = permutation._permute, []

    def failing(layer, order):
        calls.append(layer)
        if len(calls) == 4:
            raise MemoryError("no memory left")
        original(layer, order)

    monkeypatch.setattr(permutation, "_permute", failing)
    with pytest.raises(MemoryError, match="no memory left"):
        co_permute(model, slices)
    assert len(calls) == 7
    assert_state(model, before)


def test_undoing_checks_first():
    model = build("llama-grouped")
    done = co_permute(model, chosen_in(model, find_structure(model)))
    twin, permuted = copy.deepcopy(model), state(model)
    with pytest.raises(ValueError, match=r"up_proj cannot be permuted: its weight is \[32, 24\], but 39 channels"):
        done.undo(build("llama-grouped", intermediate_size=32))
    with pytest.raises(ValueError, match=r"the model has no layer model\.layers\.1"):
        done.undo(build("llama-grouped", num_hidden_layers=1))
    model.model.layers[1].mlp.down_proj = nn.Sequential(model.model.layers[1].mlp.down_proj)
    with pytest.raises(
        ValueError, match=r"down_proj cannot be permuted: it is a nn\.\S*Sequential, not a linear layer"
    ):
        done.undo(model)
    model.model.layers[1].mlp.down_proj = model.model.layers[1].mlp.down_proj[0]
    assert_state(model, permuted)
    assert done.active
    done.undo(model)
    assert not done.active
    with pytest.raises(ValueError, match="the permutation has been undone already"):
        done.undo(twin)
    assert_state(twin, permuted)
