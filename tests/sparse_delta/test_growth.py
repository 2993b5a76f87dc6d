"""The parts of a reselection by themselves: what is dropped, what grows, and how an optimizer's state moves along."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_kernels.nn import SparseDeltaLinear
from peft_kernels.reselection import Timetable, growth, moments

from ..support.accuracy import assert_same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def layer_with(weight, indices):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return SparseDeltaLinear.from_linear(linear, indices=torch.tensor(indices, dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 6, 20, 31])
def test_magnitude_prefers_the_larger_and_then_the_smaller_position(dtype, count):
    generator = torch.Generator().manual_seed(count)
    weight = torch.randint(-3, 4, (5, 7), generator=generator).to(dtype)  # many are equal
    layer = layer_with(weight, [0, 9, 10, 34])
    inactive = [position for position in range(35) if position not in (0, 9, 10, 34)]
    flat = weight.flatten().tolist()
    expected = sorted(sorted(inactive, key=lambda position: (-abs(flat[position]), position))[:count])
    grown = growth.by_magnitude(layer, count)
    assert grown.positions.tolist() == expected
    assert grown.positions.dtype == layer.indices.dtype
    assert_same_bits(layer.weight.detach(), weight)


def test_a_delta_does_not_count_as_magnitude():
    # The weight holds the delta; where nothing trains it is the original one.
    layer = layer_with(torch.tensor([[3.0, 1.0, 2.0]]), [1])
    with torch.no_grad():
        layer.values.fill_(100.0)
    layer.write()
    assert growth.by_magnitude(layer, 1).positions.tolist() == [0]


@pytest.mark.parametrize("active", [[], [0], [34], [0, 1, 2, 3], [5, 6, 20, 33, 34], [*range(35)]])
def test_random_growth_can_take_every_inactive_position(active):
    layer = layer_with(torch.zeros(5, 7), active)
    inactive = [position for position in range(35) if position not in active]
    generator = torch.Generator().manual_seed(0)
    assert growth.at_random(layer, len(inactive), generator).positions.tolist() == inactive
    for count in range(len(inactive)):
        positions = growth.at_random(layer, count, generator).positions.tolist()
        assert len(set(positions)) == count
        assert positions == sorted(positions)
        assert set(positions) <= set(inactive)


def test_of_equal_deltas_the_smaller_position_is_dropped():
    values = torch.tensor([2.0, -1.0, 1.0, 0.0, -1.0, 3.0])
    assert growth.kept(values, 0).all()
    assert growth.kept(values, 2).tolist() == [True, False, True, False, True, True]
    assert growth.kept(values, 3).tolist() == [True, False, False, False, True, True]
    assert not growth.kept(values, 6).any()


def test_state_follows_and_grown_entries_start_with_their_seeds():
    values = torch.zeros(4)
    state = {
        "step": torch.tensor(3.0),
        "exp_avg": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "exp_avg_sq": torch.tensor([5.0, 6.0, 7.0, 8.0]),
        "max_exp_avg_sq": torch.tensor([9.0, 9.0, 9.0, 9.0]),
        "row_max": torch.tensor([1.0, 1.0, 1.0, 1.0]),  # as many rows as entries
        "momentum_buffer": None,
    }
    found = moments.state_per_entry(state, values)
    assert found.keys() == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    kept = torch.tensor([True, False, True, False])
    source = torch.tensor([2, 0, 1, 3])  # the first grown one comes first, then those that stay, then the other
    grown = growth.Growth(torch.tensor([0, 9]), torch.tensor([10.0, 20.0]), torch.tensor([30.0, 40.0]))
    seeds = moments.seeds(state, {"betas": (0.5, 0.75)}, grown)
    moments.move(found, kept, source, seeds)
    assert state["exp_avg"].tolist() == [10 * 0.875, 1.0, 3.0, 20 * 0.875]
    assert state["exp_avg_sq"].tolist() == [30 * (1 - 0.75**3), 5.0, 7.0, 40 * (1 - 0.75**3)]
    assert state["max_exp_avg_sq"].tolist() == [0.0, 9.0, 9.0, 0.0]
    assert state["row_max"].tolist() == [1.0] * 4


@pytest.mark.parametrize("maximize", [False, True])
def test_seeds_come_out_of_adams_bias_correction_as_the_means(maximize):
    # What torch's AdamW makes of them with no decay of its own and a gradient equal to the mean.
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.0, eps=0.0, maximize=maximize)
    for _ in range(37):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    mean = torch.tensor([0.3, -4.0], dtype=torch.float64)
    grown = growth.Growth(torch.tensor([1, 2]), mean, mean**2)
    seeds = moments.seeds(optimizer.state[parameter], optimizer.param_groups[0], grown)
    for name, seed in seeds.items():
        optimizer.state[parameter][name].copy_(seed)
    before = parameter.detach().clone()
    parameter.grad = mean.clone()
    optimizer.step()
    step = before - parameter.detach()  # lr m / sqrt(v) with m = g and v = g^2
    torch.testing.assert_close(step, -mean.sign() if maximize else mean.sign())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_falls_from_the_initial_one_to_zero(schedule):
    timetable = Timetable(20, 5, 0.2, schedule, 100)
    rates = [timetable.rate(step) for step in range(121)]
    assert rates[0] == 0.2
    assert rates[50] == pytest.approx(0.1)
    assert rates[25] == pytest.approx(0.15 if schedule == "linear" else 0.2 * (1 + 0.5**0.5) / 2)
    assert rates[100:] == [pytest.approx(0.0, abs=1e-17)] * 21
    assert rates == sorted(rates, reverse=True)


def test_windows_open_in_each_cycle_and_end_before_the_training_does():
    timetable = Timetable(20, 5, 0.2, "linear", 84)
    assert [step for step in range(85) if timetable.opens(step)] == [0, 20, 40, 60]
    assert [step for step in range(1, 85) if timetable.ends(step)] == [5, 25, 45, 65]
    assert [step for step in range(1, 85) if timetable.is_first(step)] == [5]
