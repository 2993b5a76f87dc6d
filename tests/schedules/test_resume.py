"""A run that is saved and continued, in the middle of a period too, ends in the bits of one that was not."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch

from peft_kernels.schedules import HFT, LISA, GreenTrainer

from ..support.accuracy import assert_same_bits
from .nets import OPTIMIZERS, SAMPLE, assert_same_parameters, net, run

POLICIES = {
    "LISA": lambda model, optimizer, seed: LISA(model, optimizer, interval=4, seed=seed),
    "HFT": lambda model, optimizer, seed: HFT(model, optimizer, interval=4, seed=seed),
    "GreenTrainer": lambda model, optimizer, seed: GreenTrainer(
        model, optimizer, SAMPLE[:, : 3 + seed], rho=0.4, interval=4
    ),
}
TOTAL = 11


def build(policy, optimizer_name, seed=0):
    """Another seed gives other weights, other choices and another sample batch."""
    model = net(seed)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    return model, optimizer, POLICIES[policy](model, optimizer, seed)


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_run(ours, theirs):
    """All bits of two runs: weights, optimizer, schedule."""
    assert_same_parameters(ours[0], theirs[0])
    assert ours[2].state_dict() == theirs[2].state_dict()
    for parameter, other in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        assert parameter.requires_grad == other.requires_grad
        state, other_state = ours[1].state.get(parameter, {}), theirs[1].state.get(other, {})
        assert state.keys() == other_state.keys()
        for name, value in state.items():
            assert_same_bits(torch.as_tensor(value).view(-1), torch.as_tensor(other_state[name]).view(-1), name)


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 8, 10])
@pytest.mark.parametrize(
    ("policy", "optimizer_name"),
    [
        ("LISA", "AdamW"),
        ("LISA", "Adagrad"),
        ("HFT", "SparseAdamW"),
        ("HFT", "AdamW fused"),
        ("GreenTrainer", "AdamW foreach"),
        ("GreenTrainer", "SGD"),
        ("GreenTrainer", "Adagrad"),
    ],
)
def test_a_continued_run_ends_in_the_same_bits(policy, optimizer_name, stop):
    whole = build(policy, optimizer_name)
    trained = run(*whole, 0, TOTAL)
    assert len({frozenset(names) for names in trained}) > 1

    stopped = build(policy, optimizer_name)
    run(*stopped, 0, stop)
    model_state, optimizer_state = (through_a_file(part.state_dict()) for part in stopped[:2])
    schedule_state = json.loads(json.dumps(stopped[2].state_dict(), sort_keys=True))

    continued = build(policy, optimizer_name, seed=2)
    continued[0].load_state_dict(model_state)
    continued[1].load_state_dict(optimizer_state)
    continued[2].load_state_dict(schedule_state)
    run(*continued, stop, TOTAL)
    assert_same_run(whole, continued)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_optimizers_state_may_be_loaded_first_or_last(policy):
    stopped = build(policy, "AdamW")
    run(*stopped, 0, 6)
    states = [through_a_file(part.state_dict()) for part in stopped]
    run(*stopped, 6, TOTAL)
    for schedule_first in (False, True):
        model = net(3)
        optimizer = OPTIMIZERS["AdamW"](model.parameters())
        model.load_state_dict(states[0])
        if not schedule_first:  # before there is a schedule, as the Trainer does it
            optimizer.load_state_dict(copy.deepcopy(states[1]))  # which takes tensors over as they are
        schedule = POLICIES[policy](model, optimizer, 1)
        schedule.load_state_dict(states[2])
        if schedule_first:
            optimizer.load_state_dict(copy.deepcopy(states[1]))
        run(model, optimizer, schedule, 6, TOTAL)
        assert_same_run(stopped, (model, optimizer, schedule))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_state_can_be_loaded_back_into_the_run_it_is_from(policy):
    parts = build(policy, "AdamW")
    run(*parts, 0, 6)
    states = [through_a_file(part.state_dict()) for part in parts]
    run(*parts, 6, TOTAL)
    end = through_a_file(parts[0].state_dict())
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    run(*parts, 6, TOTAL)
    for name, weight in parts[0].state_dict().items():
        assert_same_bits(weight, end[name], name)


def test_state_of_a_full_fine_tuning_is_dropped_where_a_schedule_takes_over():
    model = net()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule = LISA(model, optimizer, seed=1)
    names = dict(model.named_parameters())
    kept = {name: optimizer.state[names[name]] for name in schedule.training}
    run(model, optimizer, schedule, 0, 1)
    assert all(names[name] not in optimizer.state for name in schedule.frozen)
    assert all(optimizer.state[names[name]] is state for name, state in kept.items())
