"""LT-SFT's first phase: the positions that changed most, by an exact threshold over all layers, and the way back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.nn import SparseDeltaLinear

from ..support.accuracy import assert_same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(9, 7), nn.LayerNorm(7), nn.Linear(7, 5, bias=False), nn.Linear(5, 3)).to(dtype)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trained(dtype=torch.float32, step=0.1):
    """A model after full fine-tuning, and its tensors before."""
    model = net(dtype)
    before = snapshot(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            change = step * torch.randn(parameter.shape, generator=generator)
            parameter += change.to(dtype)
    return model, before


def by_sorting(model, before, count, paths=("0", "2", "3")):
    """The same choice by sorting all changes in Python: (layer, position) of the largest."""
    entries = []
    for order, path in enumerate(paths):
        weight, old = model.get_submodule(path).weight.detach(), before[f"{path}.weight"]
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        for position, change in enumerate((weight.to(wide) - old.to(wide)).abs().flatten().tolist()):
            entries.append((-change, order, position))
    chosen = {}
    for _, order, position in sorted(entries)[:count]:
        chosen.setdefault(paths[order], []).append(position)
    return {path: sorted(positions) for path, positions in sorted(chosen.items())}


def as_lists(positions):
    return {path: indices.tolist() for path, indices in sorted(positions.items())}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 40, 113])
def test_positions_are_those_of_a_sort_of_all_changes(dtype, count):
    model, before = trained(dtype)
    weights = snapshot(model)
    positions = pk.lottery_ticket_positions(model, before, num_deltas=count)
    assert as_lists(positions) == by_sorting(model, before, count)
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, weights[name])
    for path, indices in positions.items():
        assert indices.dtype == torch.int32
        pk.ops.check_indices(indices, model.get_submodule(path).weight.numel())


@pytest.mark.parametrize("count", [5, 30, 60, 100])
def test_ties_go_to_the_earlier_layer_and_the_smaller_position(count):
    model, before = trained()
    with torch.no_grad():  # changes of a few sizes only, and many that are zero
        for path in ("0", "2", "3"):
            weight = model.get_submodule(path).weight
            before[f"{path}.weight"] = torch.zeros_like(weight)
            weight.copy_(torch.randint(-1, 3, weight.shape).float())
    positions = pk.lottery_ticket_positions(model, before, num_deltas=count)
    assert as_lists(positions) == by_sorting(model, before, count)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_tiny_and_huge_changes_are_told_apart(scale):
    model, before = trained()
    with torch.no_grad():
        for path in ("0", "2", "3"):
            weight = model.get_submodule(path).weight
            before[f"{path}.weight"] = torch.zeros_like(weight)
            weight.copy_(torch.randn(weight.shape) * scale)
    positions = pk.lottery_ticket_positions(model, before, num_deltas=33)
    assert as_lists(positions) == by_sorting(model, before, 33)


def test_mixed_dtypes_are_compared_in_the_widest():
    model, before = trained()
    model[2].to(torch.float64)
    before["2.weight"] = before["2.weight"].double()
    positions = pk.lottery_ticket_positions(model, before, density=0.3)
    assert sum(len(indices) for indices in positions.values()) == round(0.3 * 113)
    assert as_lists(positions) == by_sorting(model, before, round(0.3 * 113))


def test_each_layer_by_itself():
    model, before = trained()
    positions = pk.lottery_ticket_positions(model, before, density=0.1, per_layer=True)
    assert {path: len(indices) for path, indices in positions.items()} == {"0": 6, "2": 4, "3": 2}
    for path, indices in positions.items():
        assert {path: indices.tolist()} == by_sorting(model, before, len(indices), (path,))


def test_named_layers_only_and_layers_without_a_choice_are_left_out():
    model, before = trained()
    assert list(pk.lottery_ticket_positions(model, before, num_deltas=4, layers=["2"])) == ["2"]
    with torch.no_grad():
        model[3].weight.copy_(before["3.weight"])
    assert "3" not in pk.lottery_ticket_positions(model, before, num_deltas=9)
    assert pk.lottery_ticket_positions(model, before, num_deltas=0) == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_phases(dtype):
    model, before = trained(dtype)
    positions = pk.lottery_ticket_positions(model, before, density=0.2)
    pk.rewind(model, before)
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name])
    for path, indices in positions.items():
        layer = SparseDeltaLinear.from_linear(model.get_submodule(path), indices=indices)
        setattr(model, path, layer)
    layers = {path: model.get_submodule(path) for path in positions}
    assert layers
    optimizer = pk.optim.SparseAdamW([layer.values for layer in layers.values()], lr=0.1)
    model(torch.randn(4, 9, dtype=dtype)).square().sum().backward()
    optimizer.step()
    for path, layer in layers.items():
        changed = (layer.weight.detach() != before[f"{path}.weight"]).flatten().nonzero().flatten()
        assert set(changed.tolist()) <= set(positions[path].tolist())
        assert len(changed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either density or num_deltas"),
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"num_deltas": 114}, r"num_deltas must be an integer in \[0, 113\], got 114"),
        ({"density": 0.1, "layers": ["1"]}, "layers must be paths of nn.Linear layers, but '1' is a LayerNorm"),
        ({"density": 0.1, "layers": ["9"]}, "layers must be paths of nn.Linear layers, but '9' is nothing"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    model, before = trained()
    with pytest.raises(ValueError, match=message):
        pk.lottery_ticket_positions(model, before, **arguments)


def test_bad_weights_are_refused():
    model, before = trained()
    with pytest.raises(ValueError, match=r"before must hold the weight of an nn.Linear of the model, and holds none"):
        pk.lottery_ticket_positions(model, {}, density=0.1)
    with pytest.raises(ValueError, match=r"before must hold 2.weight, the weight of a layer to choose in"):
        pk.lottery_ticket_positions(model, {"0.weight": before["0.weight"]}, density=0.1, layers=["2"])
    with pytest.raises(ValueError, match=r"before must hold 0.weight as \[7, 9\], got \[9, 7\]"):
        pk.lottery_ticket_positions(model, {**before, "0.weight": before["0.weight"].t()}, density=0.1)
    before["2.weight"][1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"the change of 2.weight is NaN somewhere"):
        pk.lottery_ticket_positions(model, before, density=0.1)


def test_rewind_refuses_what_does_not_fit_and_changes_nothing():
    model, before = trained()
    now = snapshot(model)
    for change, message in (
        ({"9.weight": before["0.weight"]}, "it has no 9.weight"),
        ({"0.bias": before["0.bias"][:2]}, r"before must hold 0.bias as torch.float32 \[7\], got torch.float32 \[2\]"),
        ({"0.bias": before["0.bias"].double()}, r"got torch.float64 \[7\]"),
    ):
        with pytest.raises(ValueError, match=message):
            pk.rewind(model, {**before, **change})
        for name, tensor in model.state_dict().items():
            assert_same_bits(tensor, now[name])
