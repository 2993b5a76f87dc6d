"""Every policy with every optimizer: the same bits as plain optimizers of single parameters, made and thrown away."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from peft_kernels.schedules import HFT, LISA, GreenTrainer
from peft_kernels.schedules.base import schedule_of

from .nets import (
    OPTIMIZERS,
    SAMPLE,
    assert_same_parameters,
    assert_state_is_that_of_what_trains,
    backward,
    batches,
    loss_of,
    net,
    run,
    run_plainly,
)

POLICIES = {
    "LISA": lambda model, optimizer: LISA(model, optimizer, active_layers=2, interval=3, seed=1),
    "HFT": lambda model, optimizer: HFT(model, optimizer, interval=3, seed=1),
    "HFT, embeddings frozen": lambda model, optimizer: HFT(model, optimizer, interval=3, embeddings="freeze"),
    "GreenTrainer": lambda model, optimizer: GreenTrainer(model, optimizer, SAMPLE, rho=0.4, interval=3),
}
STEPS = 11
EACH_POLICY = pytest.mark.parametrize("policy", POLICIES)


@EACH_POLICY
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_training_is_that_of_fresh_optimizers_in_each_period(policy, optimizer_name):
    make_optimizer = OPTIMIZERS[optimizer_name]
    model = net(bias=True)
    optimizer = make_optimizer(model.parameters())
    schedule = POLICIES[policy](model, optimizer)
    managed = {*schedule.training, *schedule.frozen}
    trained = run(model, optimizer, schedule, 0, STEPS)
    assert len({frozenset(names) for names in trained}) > 1
    assert all(trained[step] == trained[step - step % 3] for step in range(STEPS))

    plain = net(bias=True)
    everything = set(dict(plain.named_parameters()))

    def clip_to(step):  # an evaluation has the gradients of all
        evaluates = policy == "GreenTrainer" and step % 3 == 0
        return everything if evaluates else everything - managed | trained[step]

    run_plainly(plain, make_optimizer, managed, trained, clip_to)
    assert_same_parameters(model, plain)


@EACH_POLICY
@pytest.mark.parametrize("optimizer_name", ["AdamW", "SGD", "Adagrad"])
def test_state_is_dropped_and_groups_stay(policy, optimizer_name):
    model = net()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = OPTIMIZERS[optimizer_name]([{"params": decayed}, {"params": others, "weight_decay": 0.0}])
    schedule = POLICIES[policy](model, optimizer)
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    names = dict(model.named_parameters())
    kept = {}
    for step in range(8):
        run(model, optimizer, schedule, step, step + 1)
        if not (policy == "GreenTrainer" and schedule.completed_steps % 3 == 0):  # then all gradients are asked for
            assert_state_is_that_of_what_trains(model, optimizer, schedule)
        for name, state in kept.items():
            if name in schedule.training and name in kept:
                assert optimizer.state[names[name]] is state, "what goes on keeps its state"
        kept = {name: optimizer.state[names[name]] for name in schedule.training if names[name] in optimizer.state}
        assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == groups
    assert optimizer.param_groups[1]["weight_decay"] == 0.0


def test_adagrad_has_its_state_before_the_first_step():
    model = net()
    optimizer = OPTIMIZERS["Adagrad"](model.parameters())
    schedule = LISA(model, optimizer, active_layers=1, interval=1, seed=2)
    before = set(schedule.training)
    while not set(schedule.training) - before:
        run(model, optimizer, schedule, schedule.completed_steps, schedule.completed_steps + 1)
    for name in schedule.training:
        state = optimizer.state[model.get_parameter(name)]
        assert state["step"] == 0 and (state["sum"] == 0.2).all()


@EACH_POLICY
def test_memory_of_dropped_state_is_freed(policy):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = POLICIES[policy](model, optimizer)
    run(model, optimizer, schedule, 0, 2)
    watched = {
        name: weakref.ref(optimizer.state[parameter]["exp_avg"])
        for name, parameter in model.named_parameters()
        if name in schedule.training
    }
    run(model, optimizer, schedule, 2, 4)
    gc.collect()
    for name, moment in watched.items():
        assert (moment() is None) == (name in schedule.frozen), name


@EACH_POLICY
def test_what_the_user_froze_stays_frozen(policy):
    model = net()
    frozen = ["embedding.weight", "layers.1.mlp.up_proj.weight", "layers.2.attention.q_proj.weight"]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {name: model.get_parameter(name).clone() for name in frozen}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = POLICIES[policy](model, optimizer)
    assert not {*schedule.training, *schedule.frozen} & set(frozen)
    run(model, optimizer, schedule, 0, 7)
    schedule.close()
    for name in frozen:
        assert not model.get_parameter(name).requires_grad
        assert torch.equal(model.get_parameter(name), before[name])


def test_what_lies_outside_is_not_touched():
    model = net()
    model.head.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = LISA(model, optimizer, interval=1)
    outside = {"embedding.weight", "norm.weight", "norm.bias", "head.weight"}
    assert not outside & {*schedule.training, *schedule.frozen}
    model.norm.weight.grad = torch.ones_like(model.norm.weight)
    optimizer.step()
    state = optimizer.state[model.norm.weight]
    for _ in range(3):
        schedule.step()
    assert model.norm.weight.grad is not None and model.norm.weight.requires_grad
    assert optimizer.state[model.norm.weight] is state
    assert not model.head.weight.requires_grad


@EACH_POLICY
def test_random_generators_are_left_alone(policy):
    import random

    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(3)
    random.seed(3)
    before, plain = torch.get_rng_state(), random.getstate()
    schedule = POLICIES[policy](model, optimizer)
    assert torch.equal(torch.get_rng_state(), before)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    for _ in range(7):
        optimizer.step()
        schedule.step()
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == plain


@EACH_POLICY
def test_a_run_is_repeated_bit_for_bit(policy):
    models = []
    for _ in range(2):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        run(model, optimizer, POLICIES[policy](model, optimizer), 0, 7)
        models.append(model)
    assert_same_parameters(*models)


@EACH_POLICY
def test_a_step_left_out_does_not_count(policy):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = POLICIES[policy](model, optimizer)
    backward(model, SAMPLE)
    for _ in range(5):
        assert schedule.step() is False
    assert schedule.completed_steps == 0
    optimizer.step()
    assert schedule.step() is False
    assert schedule.step() is False
    assert schedule.completed_steps == 1
    for expected in (False, True):
        optimizer.zero_grad()
        backward(model, SAMPLE)
        optimizer.step()
        assert schedule.step() is expected


@EACH_POLICY
def test_close_lets_everything_train_again(policy):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = POLICIES[policy](model, optimizer)
    run(model, optimizer, schedule, 0, 4)
    assert schedule_of(optimizer) is schedule
    schedule.close()
    assert schedule_of(optimizer) is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    for tokens in batches(4):
        backward(model, tokens)
        optimizer.step()
        schedule.step()
    schedule.close()
    assert schedule.completed_steps == 4
    assert all(parameter in optimizer.state for parameter in model.parameters())


@EACH_POLICY
@pytest.mark.parametrize("optimizer_name", ["AdamW", "AdamW fused"])  # one is not called, the other makes no step
@pytest.mark.parametrize("overflow_at", [0, 3])
def test_a_gradient_scaler_leaves_steps_out(policy, optimizer_name, overflow_at):
    model = net()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    schedule = POLICIES[policy](model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = net()
    plain_optimizer = OPTIMIZERS[optimizer_name](plain.parameters())
    plain_schedule = POLICIES[policy](plain, plain_optimizer)
    for step, tokens in enumerate(batches(6)):
        torch.manual_seed(step)
        scaler.scale(loss_of(model, tokens)).backward()
        if step == overflow_at:
            next(p for p in model.parameters() if p.grad is not None).grad[0] = float("inf")
        else:
            torch.manual_seed(step)
            loss_of(plain, tokens).backward()
            plain_optimizer.step()
            plain_optimizer.zero_grad()
            plain_schedule.step()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        schedule.step()
    assert schedule.completed_steps == 5
    assert schedule.training == plain_schedule.training
    assert_same_parameters(model, plain)  # the scale is a power of two


@EACH_POLICY
def test_activation_checkpointing_changes_nothing(policy):
    models = []
    for checkpointed in (False, True):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = POLICIES[policy](model, optimizer)
        if checkpointed:
            for layer in model.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        run(model, optimizer, schedule, 0, 7)
        models.append(model)
    assert_same_parameters(*models)


def test_a_schedule_that_is_given_up_is_collected():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = weakref.ref(LISA(model, optimizer))
    assert schedule() is not None, "the optimizer's hooks keep it"
    del optimizer
    gc.collect()
    assert schedule() is None


def test_a_wrapped_model_and_optimizer():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = LISA(torch.compile(model), Wrapper(optimizer), interval=2)
    assert all(not name.startswith("_orig_mod") for name in schedule.training)
    run(model, optimizer, schedule, 0, 3)
    assert_state_is_that_of_what_trains(model, optimizer, schedule)


def test_the_report_says_what_trains():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = LISA(model, optimizer, active_layers=1, interval=2, seed=4)
    run(model, optimizer, schedule, 0, 1)
    report = schedule.report()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert report.completed_steps == 1
    assert report.training_elements == sum(sizes[name] for name in report.training)
    assert report.elements == 4 * report.training_elements
    assert repr(schedule) == "LISA(active_layers=1, interval=2, seed=4)"
    text = str(report)
    assert schedule.drawn(0)[0] in text and "25.0%" in text and "after 1 steps" in text
