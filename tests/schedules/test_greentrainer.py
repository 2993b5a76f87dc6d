"""GreenTrainer: what it selects, by the definitions of importance and cost, and when."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import peft_kernels as pk
from peft_kernels.schedules import GreenTrainer, profile_backward_flops
from peft_kernels.schedules.importance import importances

from ..support.accuracy import assert_same_bits
from .nets import OPTIMIZERS, SAMPLE, backward, net, run
from .test_selection import best_by_trying


def small():
    """Nine parameters to train, so that every subset can be tried."""
    model = net(layers=2)
    model.layers[0].requires_grad_(False)
    for name in ("attention_norm", "mlp_norm"):
        getattr(model.layers[1], name).requires_grad_(False)
    return model


def importance_by_hand(model, make_optimizer):
    """-sum(change * gradient), the change that of a new optimizer of each parameter alone."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        trial = nn.Parameter(parameter.detach().clone())
        trial.grad = parameter.grad.clone()
        make_optimizer([trial]).step()
        found[name] = -((trial.detach() - parameter.detach()).double() * parameter.grad.double()).sum().item()
    return found


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_the_importance_is_the_loss_that_a_first_step_takes_away(optimizer_name):
    make_optimizer = OPTIMIZERS[optimizer_name]
    model = net(bias=True)
    optimizer = make_optimizer(model.parameters())
    for tokens in (SAMPLE, SAMPLE.flip(0)):  # with state from the second time on, which does not matter
        optimizer.zero_grad()
        backward(model, tokens)
        expected = importance_by_hand(model, make_optimizer)
        state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        found = importances(dict(model.named_parameters()), optimizer)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert math.isclose(value, expected[name], rel_tol=1e-4, abs_tol=1e-8), name
            assert value > 0 or "k_proj.bias" in name, "softmax does not see what is added to all scores"
        for name, parameter in model.named_parameters():
            assert_same_bits(parameter, weights[name], name)
            assert_same_bits(parameter.grad, gradients[name], name)
        after = optimizer.state_dict()
        assert after["state"].keys() == state["state"].keys()
        for number, entries in state["state"].items():
            for name, value in entries.items():
                assert torch.equal(torch.as_tensor(after["state"][number][name]), torch.as_tensor(value))
        optimizer.step()


@pytest.mark.parametrize("rho", [0.1, 0.3, 0.6, 1.0])
def test_the_selection_is_the_best_that_the_budget_allows(rho):
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    flops = profile_backward_flops(model, SAMPLE)
    schedule = GreenTrainer(model, optimizer, SAMPLE, rho=rho, interval=2)
    backward(model, SAMPLE)
    importance = importance_by_hand(model, OPTIMIZERS["AdamW"])
    optimizer.step()
    assert flops.of(schedule.training) <= rho * flops.full
    assert schedule.backward_share == flops.of(schedule.training) / flops.full
    best = best_by_trying(importance, flops, int(rho * flops.full))
    chosen = sum(importance[name] for name in schedule.training)
    assert best * 0.999 < chosen <= best * 1.0001  # rounding costs at most a little
    if rho == 1.0:
        assert schedule.frozen == ()


def test_only_the_first_step_of_a_period_has_all_gradients():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = GreenTrainer(model, optimizer, SAMPLE, rho=0.4, interval=3)
    everything = dict(model.named_parameters())
    for step in range(7):
        backward(model, SAMPLE)
        with_gradient = {name for name, parameter in everything.items() if parameter.grad is not None}
        assert with_gradient == (set(everything) if step % 3 == 0 else set(schedule.training))
        before = {name: parameter.detach().clone() for name, parameter in everything.items()}
        optimizer.step()
        moved = {name for name, parameter in everything.items() if not torch.equal(parameter, before[name])}
        assert moved == set(schedule.training)
        assert {id(parameter) for parameter in optimizer.state} == {id(everything[name]) for name in schedule.training}
        optimizer.zero_grad()
        schedule.step()


def test_the_learning_rate_of_a_warm_up_does_not_matter():
    selections = []
    for warm_up in (False, True):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if warm_up:
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
            assert optimizer.param_groups[0]["lr"] == 0.0
        schedule = GreenTrainer(model, optimizer, SAMPLE, rho=0.4)
        backward(model, SAMPLE)
        optimizer.step()
        selections.append(schedule.training)
    assert selections[0] == selections[1]


def test_a_group_that_learns_nothing_is_worth_nothing():
    model = net()
    frozen = [p for name, p in model.named_parameters() if "mlp" in name]
    rest = [p for name, p in model.named_parameters() if "mlp" not in name]
    optimizer = torch.optim.AdamW([{"params": frozen, "lr": 0.0}, {"params": rest}], lr=0.01)
    schedule = GreenTrainer(model, optimizer, SAMPLE, rho=1.0)
    backward(model, SAMPLE)
    optimizer.step()
    assert schedule.training and not any("mlp" in name for name in schedule.training)


def test_in_bfloat16_changes_do_not_round_away():
    model = net().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7, weight_decay=0.0)
    schedule = GreenTrainer(model, optimizer, SAMPLE, rho=0.4)
    backward(model, SAMPLE)
    gradients = {name: p.grad.double() for name, p in model.named_parameters()}
    optimizer.step()
    for name, value in schedule.importance.items():
        # A first step of Adam is lr * sign(g), but for eps and float32's rounding of weights near 1.
        assert value == pytest.approx(1e-7 * gradients[name].abs().sum().item(), rel=0.3), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_without_finite_gradients_it_evaluates_again(bad):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = GreenTrainer(model, optimizer, SAMPLE, rho=0.4, interval=4)
    before = copy.deepcopy(model.state_dict())
    backward(model, SAMPLE)
    model.layers[0].mlp.up_proj.weight.grad[0, 0] = bad
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    for name, weight in model.state_dict().items():
        assert_same_bits(weight, before[name], name)
    assert schedule.importance == {}
    run(model, optimizer, schedule, 0, 3)
    first = set(schedule.training)
    assert schedule.frozen and schedule.completed_steps == 4
    # In a later evaluation, what was selected before goes on.
    backward(model, SAMPLE)
    frozen = next(name for name in schedule.frozen)
    model.get_parameter(frozen).grad[0] = bad
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == first


def test_what_takes_no_part_is_worth_nothing():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = GreenTrainer(model, optimizer, SAMPLE, rho=1.0)
    backward(model, SAMPLE)
    model.layers[1].mlp.up_proj.weight.grad = None
    optimizer.step()
    assert schedule.frozen == ("layers.1.mlp.up_proj.weight",)


def test_flops_may_be_given():
    model = net()
    flops = profile_backward_flops(model, SAMPLE)
    schedule = GreenTrainer(model, torch.optim.AdamW(model.parameters()), flops)
    assert schedule.flops is flops
    assert schedule.budget == flops.full // 2
    other = profile_backward_flops(net(layers=2), SAMPLE)
    with pytest.raises(ValueError, match=r"sample_batch must hold the FLOPs of the parameters that train; 'layers.2"):
        schedule.close()
        GreenTrainer(model, torch.optim.AdamW(model.parameters()), other)


def test_hooks_of_other_things_do_not_see_the_evaluation():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    everywhere = register_optimizer_step_post_hook(lambda *_: calls.append(2))
    try:
        schedule = GreenTrainer(model, optimizer, SAMPLE)
        backward(model, SAMPLE)
        optimizer.step()
        schedule.step()
    finally:
        everywhere.remove()
    assert calls == [1, 2]


def test_a_closure_is_refused_before_anything_changes():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    GreenTrainer(model, optimizer, SAMPLE)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"GreenTrainer needs gradients before optimizer\.step"):
        optimizer.step(lambda: backward(model, SAMPLE))
    for name, weight in model.state_dict().items():
        assert_same_bits(weight, before[name], name)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, r"rho must be in \(0, 1\], got 0.0"),
        ({"rho": 1.1}, r"rho must be in \(0, 1\], got 1.1"),
        ({"rho": float("nan")}, r"rho must be in \(0, 1\], got nan"),
        ({"rho": True}, r"rho must be in \(0, 1\], got True"),
        ({"rho": 1e-9}, r"rho must be at least .*, what the cheapest tensor 'head.weight' costs, got 1e-09"),
        ({"interval": 0}, "interval must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(options, message):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=message):
        GreenTrainer(model, optimizer, SAMPLE, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks


def test_an_empty_sample_batch_is_refused():
    model = net()
    with pytest.raises(ValueError, match="sample_batch must have rows"):
        GreenTrainer(model, torch.optim.AdamW(model.parameters()), SAMPLE[:0])


def test_deltas_that_are_written_into_a_weight_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    pk.inject(model, pk.SparseDeltaConfig(num_deltas=4))
    values = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with pytest.raises(ValueError, match="must be a weight, and is a delta"):
        GreenTrainer(model, torch.optim.AdamW(values), torch.ones(1, 4))
