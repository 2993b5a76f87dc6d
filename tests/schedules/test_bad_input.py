"""What no schedule can work with is refused, in words, before anything has changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft_kernels.schedules import HFT, LISA, GreenTrainer

from .nets import SAMPLE, net, run

POLICIES = {
    "LISA": LISA,
    "HFT": HFT,
    "GreenTrainer": lambda model, optimizer: GreenTrainer(model, optimizer, SAMPLE),
}
EACH_POLICY = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@EACH_POLICY
def test_a_model_that_is_none_is_refused(policy):
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got list"):
        policy([], torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))


@EACH_POLICY
def test_an_optimizer_that_is_none_is_refused(policy):
    model = net()
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got str"):
        policy(model, "AdamW")
    with pytest.raises(ValueError, match="LBFGS keeps one for all of them"):
        policy(model, torch.optim.LBFGS(model.parameters()))
    assert all(parameter.requires_grad for parameter in model.parameters())


@EACH_POLICY
def test_an_optimizer_that_lacks_a_parameter_is_refused(policy):
    model = net()
    missing = model.layers[3].mlp.down_proj.weight
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter is not missing])
    with pytest.raises(ValueError, match=r"and does not hold 'layers.3.mlp.down_proj.weight'"):
        policy(model, optimizer)
    assert all(parameter.requires_grad for parameter in model.parameters())


@EACH_POLICY
def test_a_second_schedule_is_refused(policy):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    first = LISA(model, optimizer, seed=6)
    with pytest.raises(ValueError, match=r"optimizer has a schedule already, LISA\(.*seed=6\); close\(\) that one"):
        policy(model, optimizer)
    frozen = first.frozen
    first.close()
    policy(model, optimizer)
    assert frozen


def test_a_model_without_layers_is_refused():
    model = nn.Linear(3, 3)
    for policy in (LISA, HFT):
        with pytest.raises(ValueError, match=r"model must hold its transformer layers in an nn.ModuleList"):
            policy(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_model_that_does_not_train_is_refused():
    model = net().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="model must have parameters that train, and has none"):
        GreenTrainer(model, optimizer, SAMPLE)


def test_sharded_parameters_are_refused():
    class Sharded(nn.Parameter):
        def to_local(self):
            return self

    model = net()
    model.layers[2].mlp.up_proj.weight = Sharded(torch.ones(12, 8))
    with pytest.raises(TypeError, match=r"'layers.2.mlp.up_proj.weight' must be held in whole, got a Sharded"):
        LISA(model, torch.optim.AdamW(model.parameters()))


def changed(state, **changes):
    return {**copy.deepcopy(state), **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"format": 2}, "state must have format 1, got 2"),
        (lambda state: {"schedule": "HFT"}, "state must have schedule 'GreenTrainer', got 'HFT'"),
        (lambda state: {"settings": {"interval": 3, "rho": 0.9}}, r"state must have settings \{.*0.4\}, got \{.*0.9\}"),
        (lambda state: {"completed_steps": -1}, "completed_steps of the state must be an integer of at least 0, got"),
        (lambda state: {"frozen": state["frozen"][1:]}, "is only one of this schedule's"),
        (lambda state: {"frozen": [*state["frozen"], "other"]}, "'other' is only one of the state's"),
        (lambda state: {"frozen": [*state["frozen"], state["training"][0]]}, "must name each parameter once"),
        (
            lambda state: {"flops": {**state["flops"], "tensors": {"other": [0, 1]}}},
            "state must hold the FLOPs of this schedule's parameters",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = GreenTrainer(model, optimizer, SAMPLE, rho=0.4, interval=3)
    run(model, optimizer, schedule, 0, 2)
    before = copy.deepcopy(schedule.state_dict())
    asking = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        schedule.load_state_dict(changed(before, **change(before)))
    assert schedule.state_dict() == before
    assert [parameter.requires_grad for parameter in model.parameters()] == asking


@pytest.mark.parametrize("missing", ["format", "seed", "training", "completed_steps"])
def test_a_state_that_lacks_something_is_refused(missing):
    model = net()
    schedule = LISA(model, torch.optim.AdamW(model.parameters()))
    state = schedule.state_dict()
    del state[missing]
    with pytest.raises(ValueError, match=f"state must be a schedule's state_dict, but has no {missing}"):
        schedule.load_state_dict(state)
