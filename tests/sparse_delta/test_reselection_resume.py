"""A run that is saved and continued, in the middle of a selection window too, ends in the bits of one that was not."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from peft_kernels import Reselector

from ..support.accuracy import assert_same_bits
from ..support.sparse_training import batches, layers_of, make_optimizer, small_net, train_step

SETTINGS = {"reselection_steps": 4, "selection_accumulation_steps": 3, "initial_reselection_rate": 0.5}
TOTAL = 14
PARTS = 2
EACH_METHOD = pytest.mark.parametrize(
    ("selection", "optimizer"),
    [("rigl", "AdamW"), ("rigl", "SparseAdamW"), ("rigl", "SGD"), ("sm3", "SparseSM3"), ("random", "SparseAdamW")],
)


def build(selection, optimizer_name, seed=0):
    """Model, optimizer and reselector; another seed gives other weights, positions and random choices."""
    model = small_net(torch.float32, seed)
    optimizer = make_optimizer(optimizer_name, model)
    return model, optimizer, Reselector(model, optimizer, selection, total_steps=TOTAL, seed=seed, **SETTINGS)


def run(model, optimizer, reselector, first, last):
    data = batches(TOTAL * PARTS, torch.float32)
    for step in range(first, last):
        train_step(model, optimizer, reselector, data[step * PARTS : (step + 1) * PARTS], max_norm=0.05)


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_run(ours, theirs):
    """All bits of two runs: layers, optimizer, selection."""
    (model, optimizer, reselector), (other_model, other_optimizer, other_reselector) = ours, theirs
    for layer, other in zip(layers_of(model), layers_of(other_model), strict=True):
        layer.write()
        other.write()
        for name, tensor in layer.state_dict().items():
            assert_same_bits(tensor, other.state_dict()[name], name)
        state, other_state = optimizer.state[layer.values], other_optimizer.state[other.values]
        assert state.keys() == other_state.keys()
        for name, tensor in state.items():
            if isinstance(tensor, torch.Tensor):
                assert_same_bits(tensor.view(-1), other_state[name].view(-1), name)
    state, other_state = reselector.state_dict(), other_reselector.state_dict()
    tensors, other_tensors = state.pop("tensors"), other_state.pop("tensors")
    assert state == other_state
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert_same_bits(tensor, other_tensors[name], name)


@EACH_METHOD
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 6, 8, 13])
def test_a_continued_run_ends_in_the_same_bits(selection, optimizer, stop):
    whole = build(selection, optimizer)
    run(*whole, 0, TOTAL)

    stopped = build(selection, optimizer)
    run(*stopped, 0, stop)
    states = [through_a_file(part.state_dict()) for part in stopped]

    continued = build(selection, optimizer, seed=8)
    for part, state in zip(continued, states, strict=True):
        part.load_state_dict(state)
    assert_same_run(stopped, continued)
    run(*continued, stop, TOTAL)
    assert_same_run(whole, continued)


def test_a_state_can_be_loaded_back_into_the_run_it_is_from():
    parts = build("rigl", "SparseAdamW")
    run(*parts, 0, 6)
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    run(*parts, 6, TOTAL)
    end = [copy.deepcopy(layer.state_dict()) for layer in layers_of(parts[0])]
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    run(*parts, 6, TOTAL)
    for layer, expected in zip(layers_of(parts[0]), end, strict=True):
        for name, tensor in layer.state_dict().items():
            assert_same_bits(tensor, expected[name], name)


def test_the_state_is_a_snapshot():
    parts = build("rigl", "SparseAdamW")
    run(*parts, 0, 1)
    state = parts[2].state_dict()
    before = copy.deepcopy(state["tensors"])
    run(*parts, 1, TOTAL)
    for name, tensor in state["tensors"].items():
        assert_same_bits(tensor, before[name], name)


def test_passes_that_no_step_has_used_are_not_in_the_state():
    # They are repeated after loading, as their gradients have to be.
    stopped = build("rigl", "SparseAdamW")
    states = [through_a_file(part.state_dict()) for part in stopped]
    model, _, reselector = stopped
    x, y = batches(1, torch.float32)[0]
    ((model(x) - y) ** 2).mean().backward()
    assert set(reselector.state_dict()["tensors"]) == set(states[2]["tensors"])
    run(*stopped, 0, 1)  # the pass above is in this step's gradients as well
    fresh = build("rigl", "SparseAdamW")
    for part, state in zip(fresh, states, strict=True):
        part.load_state_dict(state)
    run(*fresh, 0, TOTAL)
    whole = build("rigl", "SparseAdamW")
    run(*whole, 0, TOTAL)
    assert_same_run(whole, fresh)


def wrong(name, value):
    def change(state):
        state[name] = value

    return change


def without_a_layer(state):
    del state["tensors"]["2/indices"]


def other_positions(state):
    state["tensors"]["0/indices"][0] += 1 - 2 * (state["tensors"]["0/indices"][0] > 0)


def half_a_window(state):
    del state["tensors"]["2/total"]


def unsorted_candidates(state):
    state["tensors"]["2/candidates"] = state["tensors"]["2/candidates"].flip(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("completed_steps"), "has no completed_steps"),
        (wrong("format", 7), "format 1, got 7"),
        (wrong("selection", "sm3"), "selection='rigl', got 'sm3'"),
        (wrong("reselection_steps", 5), "reselection_steps=4, got 5"),
        (wrong("selection_accumulation_steps", 1), "selection_accumulation_steps=3, got 1"),
        (without_a_layer, r"the layers \['0', '2'\], got \['0'\]"),
        (other_positions, "other positions of layer '0'; load the model's state first"),
        (half_a_window, r"of layer '2', of one shape, got \['candidates', 'total_squares'\]"),
        (unsorted_candidates, "indices must be sorted"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    parts = build("rigl", "SparseAdamW")
    run(*parts, 0, 2)
    reselector = parts[2]
    state = copy.deepcopy(reselector.state_dict())
    change(state)
    before = copy.deepcopy(reselector.state_dict())
    with pytest.raises(ValueError, match=message):
        reselector.load_state_dict(state)
    after = reselector.state_dict()
    tensors = after.pop("tensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in before.pop("tensors").items())
    assert after == before


def test_a_longer_total_is_the_new_reselectors():
    parts = build("rigl", "SparseAdamW")
    run(*parts, 0, TOTAL)
    model, optimizer, reselector = parts
    reselector.close()
    longer = Reselector(model, optimizer, total_steps=2 * TOTAL, **{**SETTINGS, "initial_reselection_rate": 1.0})
    longer.load_state_dict(reselector.state_dict())
    assert longer.completed_steps == TOTAL
    data = batches(2 * TOTAL, torch.float32)
    moved = [train_step(model, optimizer, longer, [part]) for part in data[TOTAL:]]
    # Windows end at the steps 15, 19, 23 and 27. The first was not open in the shorter run; the last moves nothing.
    assert [TOTAL + 1 + at for at, number in enumerate(moved) if number] == [19, 23]
