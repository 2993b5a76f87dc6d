"""Counts, ranks and ties of the choice, against plain Python over every unit."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest
import torch

import peft_kernels as pk
from peft_kernels.channels import ROLES, SELECTIONS, Slice, find_structure, select
from peft_kernels.channels.layers import squared_norms

from ..support.accuracy import assert_same_bits
from .architectures import ARCHITECTURES, build, every_architecture, matrix


@pytest.fixture(scope="module")
def model():
    return build("llama-grouped", num_hidden_layers=3)


@pytest.fixture(scope="module")
def structure(model):
    return find_structure(model)


def listed(selection):
    return {path: (part.dim, part.indices.tolist()) for path, part in selection.slices.items()}


def unit_norms(model, structure, role):
    """Each unit's norm in each layer, one by one: (layer's number, unit, norm), and where the units are."""
    places = structure.units(role)
    norms = []
    for number, of in enumerate(places):
        weight = matrix(model, of.path)
        weight = weight if of.dim == "output" else weight.t()
        for unit in range(of.count):
            first = of.first + unit * of.width
            norms.append((number, unit, float(weight[first : first + of.width].norm())))
    return norms, places


def best(norms, places, count, largest):
    """The channels of the `count` best units by path."""
    ordered = sorted(norms, key=lambda item: -item[2] if largest else item[2])[:count]
    chosen: dict[str, list[int]] = {}
    for number, unit, _ in ordered:
        of = places[number]
        chosen.setdefault(of.path, []).extend(of.first + unit * of.width + c for c in range(of.width))
    return {path: sorted(channels) for path, channels in chosen.items()}


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("role", ROLES)
def test_by_weight_is_by_the_norm_of_every_unit(model, structure, role, largest):
    norms, places = unit_norms(model, structure, role)
    count = len(norms) * 3 // 10
    chosen = select(model, {role: 0.3}, selection="weight", largest=largest, structure=structure)
    assert {path: part[1] for path, part in listed(chosen).items()} == best(norms, places, count, largest)
    assert {part[0] for part in listed(chosen).values()} == {"input" if role in ("o", "down") else "output"}
    assert chosen.chosen == {role: (count, len(norms))}


def test_transposed_weights_are_read_as_they_compute():
    model = build("gpt2")
    structure = find_structure(model)
    for role in ("q", "v", "o", "up", "down"):
        norms, places = unit_norms(model, structure, role)
        chosen = select(model, {role: 0.4}, selection="weight", structure=structure)
        expected = best(norms, places, len(norms) * 4 // 10, True)
        assert {path: part[1] for path, part in listed(chosen).items()} == expected


@every_architecture
def test_heads_are_whole_and_counts_are_exact(name):
    model = build(name, dtype=torch.bfloat16)
    structure = find_structure(model)
    ratios = {role: 0.4 for role in ROLES if structure.units(role)}
    chosen = select(model, ratios, seed=3, structure=structure)
    heads, key_value_heads, head_dim = ARCHITECTURES[name].heads
    assert set(chosen.chosen) == set(ratios)
    for role, (count, total) in chosen.chosen.items():
        places = structure.units(role)
        assert total == sum(of.count for of in places)
        assert count == max(1, total * 2 // 5)
        assert {of.width for of in places} == {head_dim if role in "qkvo" else 1}
        units = 0
        for of in places:
            if of.path in chosen.slices:
                part = chosen.slices[of.path].indices - of.first
                part = part[(part >= 0) & (part < of.count * of.width)]
                numbers = (part // of.width).unique()
                assert part.numel() == numbers.numel() * of.width
                units += numbers.numel()
        assert units == count
    assert [of.count for of in structure.units("q")] == [heads] * 2
    assert [of.count for of in structure.units("k")] == [key_value_heads] * 2


def test_random_depends_on_the_seed_and_on_nothing_else(model, structure):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = select(model, {"down": 0.2, "o": 0.5}, seed=1, structure=structure)
    assert torch.equal(torch.get_rng_state(), state)
    assert listed(first) == listed(select(model, {"o": 0.5, "down": 0.2}, seed=1))
    alone = select(model, {"down": 0.2}, seed=1, largest=False)
    assert listed(alone) == {path: part for path, part in listed(first).items() if path.endswith("down_proj")}
    assert listed(first) != listed(select(model, {"down": 0.2, "o": 0.5}, seed=2))
    # Global counts differ from layer to layer.
    assert len({len(part[1]) for part in listed(alone).values()}) > 1
    # Each role has a draw of its own.
    both = select(model, {"up": 0.2, "down": 0.2}, seed=1)
    ups, downs = (
        [listed(both).get(f"model.layers.{n}.mlp.{of}_proj", (0, 0))[1] for n in range(3)] for of in ("up", "down")
    )
    assert ups != downs
    # Without a seed torch's generator draws.
    torch.manual_seed(5)
    drawn = select(model, {"down": 0.2})
    assert listed(drawn) != listed(select(model, {"down": 0.2}))
    torch.manual_seed(5)
    assert listed(drawn) == listed(select(model, {"down": 0.2}))


def test_every_channel_is_as_likely(model, structure):
    counts = torch.zeros(3, 39)
    for seed in range(600):
        chosen = select(model, {"down": 0.25}, seed=seed, structure=structure)
        for number in range(3):
            path = f"model.layers.{number}.mlp.down_proj"
            if path in chosen.slices:
                counts[number, chosen.slices[path].indices] += 1
    # Mean 148.7 (29 of 117 chosen), standard deviation 10.6: five of them are passed once in 10^4 runs of 117.
    assert float((counts - 600 * 29 / 117).abs().max()) < 5 * 10.6


def test_per_layer_takes_the_share_of_each(model, structure):
    chosen = select(model, {"down": 0.2, "k": 0.01}, seed=1, budget="per_layer", structure=structure)
    sizes = {path: part.indices.numel() for path, part in chosen.slices.items()}
    assert sizes == {
        f"model.layers.{n}.{path}": size
        for n in range(3)
        for path, size in (("self_attn.k_proj", 4), ("mlp.down_proj", 7))
    }
    assert chosen.chosen == {"k": (3, 9), "down": (21, 117)}
    norms, places = unit_norms(model, structure, "down")
    chosen = select(model, {"down": 0.2}, selection="weight", budget="per_layer", structure=structure)
    for number in range(3):
        expected = best([item for item in norms if item[0] == number], places, 7, True)
        assert chosen.slices[places[number].path].indices.tolist() == expected[places[number].path]


def test_one_is_chosen_at_least_and_layers_without_any_are_named(model, structure):
    chosen = select(model, {"o": 1e-6}, seed=0, structure=structure)
    assert chosen.chosen == {"o": (1, 18)}
    assert len(chosen.slices) == 1 and len(chosen.left_out) == 2
    assert set(chosen.slices) | set(chosen.left_out) == {f"model.layers.{n}.self_attn.o_proj" for n in range(3)}
    assert all(f"none in {path}" in str(chosen) for path in chosen.left_out)
    everything = select(model, {"o": 1, "gate": 1.0}, seed=0, structure=structure)
    assert everything.left_out == ()
    assert all(part.indices.tolist() == list(range(part.indices.numel())) for part in everything.slices.values())


def test_a_share_is_a_decimal_number():
    # In binary 0.29 * 100 is a little less than 29.
    model = build("phi", num_hidden_layers=1, intermediate_size=100)
    assert select(model, {"down": 0.29}, seed=0).chosen == {"down": (29, 100)}
    assert Fraction("0.29") * 100 == 29 > 0.29 * 100


def test_equal_scores_go_to_the_earlier_layer_and_index():
    model = build("gpt2")
    for layer in (0, 1):
        model.transformer.h[layer].mlp.c_proj.weight.data.fill_(1.0)
    for largest in (True, False):
        chosen = select(model, {"down": 0.75}, selection="weight", largest=largest)
        assert chosen.slices["transformer.h.0.mlp.c_proj"].indices.tolist() == list(range(39))
        assert chosen.slices["transformer.h.1.mlp.c_proj"].indices.tolist() == list(range(58 - 39))


def statistics(structure, names, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {path: torch.rand(size, generator=generator, dtype=torch.float64) for path, size in names(structure).items()}


def consumed(structure):
    sizes = {of.output: of.heads * of.head_dim for of in structure.attentions}
    return sizes | {of.output: of.channels for of in structure.mlps}


@pytest.mark.parametrize("role", ROLES)
def test_by_activation_is_by_what_the_unit_makes(model, structure, role):
    activations = statistics(structure, consumed)
    places = structure.units(role)
    blocks = structure.attentions if role in "qkvo" else structure.mlps
    norms, products = [], []
    for number, (block, of) in enumerate(zip(blocks, places, strict=True)):
        width = consumed(structure)[block.output] // of.count
        weight = matrix(model, of.path)
        weight = weight if of.dim == "output" else weight.t()
        for unit in range(of.count):
            norm = float(activations[block.output][unit * width : (unit + 1) * width].sum().sqrt())
            norms.append((number, unit, norm))
            products.append((number, unit, norm * float(weight[of.first + unit * of.width :][: of.width].norm())))
    for selection, scores in (("activation", norms), ("weight_activation", products)):
        for largest in (True, False):
            chosen = select(
                model,
                {role: 0.5},
                selection=selection,
                largest=largest,
                structure=structure,
                activations=activations,
            )
            expected = best(scores, places, len(scores) // 2, largest)
            assert {path: part[1] for path, part in listed(chosen).items()} == expected


def test_by_gradient_is_by_the_unit_s_own():
    model = build("phi3")
    structure = find_structure(model)
    gradients = statistics(structure, lambda of: {u.path: 200 for role in ROLES for u in of.units(role)})
    for path in gradients:
        shape = matrix(model, path).shape
        gradients[path] = gradients[path][: shape[1] if path.endswith(("o_proj", "down_proj")) else shape[0]]
    for role in ROLES:
        places = structure.units(role)
        norms = [
            (number, unit, float(gradients[of.path][of.first + unit * of.width :][: of.width].sum()))
            for number, of in enumerate(places)
            for unit in range(of.count)
        ]
        chosen = select(model, {role: 0.5}, selection="gradient", structure=structure, gradients=gradients)
        assert {path: part[1] for path, part in listed(chosen).items()} == best(norms, places, len(norms) // 2, True)


def test_fused_layers_have_the_channels_of_all_their_roles():
    model = build("phi3")
    ratios = {"q": 0.5, "v": 0.5, "gate": 0.1, "up": 0.2}
    together = select(model, ratios, seed=4)
    apart = [select(model, {role: ratio}, seed=4) for role, ratio in ratios.items()]
    for path, part in together.slices.items():
        expected = torch.cat([of.slices[path].indices for of in apart if path in of.slices]).sort().values
        assert_same_bits(part.indices, expected, path)


@every_architecture
@pytest.mark.parametrize("budget", ["global", "per_layer"])
@pytest.mark.parametrize("selection", ["random", "weight"])
def test_coupled_roles_have_nested_units_and_whole_groups(name, budget, selection):
    model = build(name)
    structure = find_structure(model)
    ratios = {"q": 0.3, "k": 0.5, "v": 0.9, "o": 0.7, "up": 0.5, "gate": 0.2, "down": 0.3}
    ratios = {role: ratio for role, ratio in ratios.items() if structure.units(role)}
    chosen = select(model, ratios, selection=selection, seed=0, budget=budget, coupled=True, structure=structure)
    for family in (structure.attentions, structure.mlps):
        for block in family:
            sets = {}
            for role in ratios:
                of = block.units(role, groups=True)
                if of is None:
                    continue
                part = chosen.slices[of.path].indices if of.path in chosen.slices else torch.empty(0, dtype=torch.int64)
                part = part[(part >= of.first) & (part < of.first + of.count * of.width)] - of.first
                sets[role] = {int(channel) // of.width for channel in part}
                assert part.numel() == len(sets[role]) * of.width, "whole groups"
            ordered = sorted(sets, key=lambda role: ratios[role])
            for smaller, larger in itertools.pairwise(ordered):
                assert sets[smaller] <= sets[larger]
    # Counted in key-value heads, each with its query heads.
    key_value_heads = ARCHITECTURES[name].heads[1]
    layers = [key_value_heads] * 2 if budget == "per_layer" else [2 * key_value_heads]
    for role in "qkvo":
        expected = sum(max(1, int(Fraction(str(ratios[role])) * total)) for total in layers)
        assert chosen.chosen[role] == (expected, 2 * key_value_heads)


def test_coupled_query_heads_alone_are_not_grouped(model, structure):
    together = select(model, {"q": 0.5, "o": 0.5}, seed=1, coupled=True, structure=structure)
    assert together.chosen == {"q": (9, 18), "o": (9, 18)}
    for number in range(3):
        q, o = (together.slices[f"model.layers.{number}.self_attn.{n}_proj"].indices for n in "qo")
        assert_same_bits(q, o)


def test_layers_limit_the_choice(model, structure):
    paths = ["model.layers.2.mlp.down_proj", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]
    chosen = select(model, {"down": 0.5, "up": 0.2}, seed=0, layers=paths, coupled=True, structure=structure)
    assert set(chosen.slices) == set(paths)
    assert chosen.chosen == {"up": (7, 39), "down": (39, 78)}


def test_counts_hold_for_any_share():
    model = build("opt")
    structure = find_structure(model)
    draw = random.Random(0)
    for ratio in (1, 1e-9, 0.1, 0.29, 1 / 3, 0.5, 1 - 2**-53, *(draw.random() for _ in range(20))):
        chosen = select(model, {"down": ratio, "q": ratio}, seed=draw.randrange(2**60), structure=structure)
        exact = Fraction(str(ratio))
        assert chosen.chosen == {"q": (max(1, int(exact * 8)), 8), "down": (max(1, int(exact * 78)), 78)}
        sizes = [part.indices.numel() for path, part in chosen.slices.items() if path.endswith("fc2")]
        assert sum(sizes) == chosen.chosen["down"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratios": {}}, r"ratios must map roles to shares, got \{\}"),
        ({"ratios": {"query": 0.1}}, "ratios must have keys of q, k, v, o, up, gate, down, got 'query'"),
        ({"ratios": {"o": 0.0}}, r"ratios\['o'\] must be in \(0, 1\], got 0.0"),
        ({"ratios": {"o": 1.5}}, r"ratios\['o'\] must be in \(0, 1\], got 1.5"),
        ({"ratios": {"o": True}}, r"ratios\['o'\] must be in \(0, 1\], got True"),
        ({"ratios": {"o": float("nan")}}, r"ratios\['o'\] must be in \(0, 1\], got nan"),
        ({"selection": "magnitude"}, "selection must be one of random, weight, activation, .*, got 'magnitude'"),
        ({"budget": "layer"}, "budget must be one of global, per_layer, got 'layer'"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\^60\), got -1"),
        ({"layers": ["lm_head"]}, "layers must name layers of attention blocks or MLPs, but 'lm_head' is none"),
        ({"layers": ["model.layers.0.mlp.up_proj"]}, "ratios asks for o, but layers have none"),
        ({"selection": "activation"}, r"activations must hold model.layers.0.self_attn.o_proj, as collect_activations"),
        ({"selection": "gradient"}, r"gradients must hold model.layers.0.self_attn.o_proj, as collect_gradients"),
        (
            {
                "selection": "gradient",
                "gradients": {f"model.layers.{n}.self_attn.o_proj": torch.ones(23) for n in range(3)},
            },
            r"gradients must hold model.layers.0.self_attn.o_proj as \[24\], got \[23\]",
        ),
        (
            {
                "selection": "activation",
                "activations": {"model.layers.0.self_attn.o_proj": torch.full((24,), torch.nan)},
            },
            "the activation scores of model.layers.0.self_attn.o_proj must be finite",
        ),
    ],
)
def test_bad_arguments_are_refused(model, structure, arguments, message):
    with pytest.raises(ValueError, match=message):
        select(model, **{"ratios": {"o": 0.5}, "structure": structure, **arguments})


def test_a_role_that_the_model_does_not_have_is_refused():
    message = "ratios asks for gate, but the model has none; roles: q, k, v, o, up, down; not understood: lm_head"
    with pytest.raises(ValueError, match=message):
        select(build("opt"), {"gate": 0.1})
    assert "weight_activation" in SELECTIONS


@pytest.mark.parametrize(
    ("indices", "dim", "message"),
    [
        (torch.tensor([1, 1]), "input", "indices must be sorted, unique and not negative"),
        (torch.tensor([2, 1]), "input", "indices must be sorted"),
        (torch.tensor([-1, 1]), "output", "indices must be sorted, unique and not negative"),
        (torch.tensor([1], dtype=torch.int32), "output", r"indices must be int64 \[s\], got torch.int32 \[1\]"),
        (torch.tensor([[1]]), "output", r"indices must be int64 \[s\], got torch.int64 \[1, 1\]"),
        ([1, 2], "output", r"indices must be int64 \[s\], got list"),
        (torch.tensor([1]), "rows", "dim must be 'input' or 'output', got 'rows'"),
    ],
)
def test_slices_are_checked(indices, dim, message):
    with pytest.raises(ValueError, match=message):
        Slice(indices, dim)


def test_slices_know_whether_they_are_ranges():
    assert Slice(torch.tensor([3, 4, 5]), "input").contiguous
    assert not Slice(torch.tensor([3, 5]), "input").contiguous
    assert Slice(torch.empty(0, dtype=torch.int64), "input").contiguous


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (513, 3), (1500, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_norms_do_not_depend_on_how_the_matrix_is_cut(shape, dtype):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    before, squares = x.clone(), x.double().square()
    torch.testing.assert_close(squared_norms(x, "output"), squares.sum(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(squared_norms(x, "input"), squares.sum(0), rtol=1e-13, atol=0)
    assert_same_bits(x, before)


@pytest.mark.parametrize("dim", ["input", "output"])
def test_norms_have_the_same_bits_for_any_number_of_threads(dim):
    x = torch.randn(1100, 700)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(squared_norms(x, dim))
    finally:
        torch.set_num_threads(before)
    for squares in found[1:]:
        assert_same_bits(squares, found[0])


@pytest.mark.parametrize("budget", ["global", "per_layer"])
@pytest.mark.parametrize("selection", ["random", "weight"])
def test_what_another_adapter_trains_is_not_chosen_again(selection, budget):
    model = build("llama")
    ratios = {"o": 0.5, "down": 0.3, "up": 0.3}
    first = select(model, ratios, selection=selection, seed=0, budget=budget)
    second = select(model, ratios, selection=selection, seed=0, budget=budget, taken=[first.slices])
    assert second.chosen == first.chosen
    for path in first.slices.keys() & second.slices.keys():
        assert not torch.isin(first.slices[path].indices, second.slices[path].indices).any()


def test_too_much_taken_is_refused():
    model = build("llama")
    first = select(model, {"down": 0.7}, seed=0)
    with pytest.raises(ValueError, match=r"taken leaves \d+ units of down of the \d+ that are to be chosen"):
        select(model, {"down": 0.7}, seed=0, taken=[first.slices])


def test_an_adapter_s_slices_can_be_left_out():
    model = build("llama")
    pk.inject(model, pk.S2FTConfig(ratios={"down": 0.3}), seed=0)
    adapter = pk.slices.take(model)
    pk.eject(model, merge=False)
    chosen = select(model, {"down": 0.3}, seed=0, taken=[adapter.slices])
    pk.inject(model, pk.S2FTConfig(ratios={"down": 0.3}), positions=chosen.slices)
    assert pk.slices.overlap(adapter, pk.slices.take(model)) == 0
