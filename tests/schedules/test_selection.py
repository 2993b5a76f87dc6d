"""The dynamic programme against trying every subset."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from peft_kernels.schedules import BackwardFlops, TensorCost, select_tensors


def every_subset(names):
    return (subset for count in range(len(names) + 1) for subset in combinations(names, count))


def best_by_trying(importance, flops, budget):
    """The largest importance of any set of tensors whose backward pass fits, by the definition."""
    return max(
        sum(importance[name] for name in subset)
        for subset in every_subset(list(flops.tensors))
        if flops.of(subset) <= budget
    )


def random_case(seed, largest):
    """Up to ten tensors on up to six levels; some levels empty, some tensors and levels free, some worth nothing."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high):
        return int(torch.randint(high, (), generator=generator))

    levels = 1 + draw(6)
    tensors = {f"t{index}": TensorCost(draw(levels), draw(largest)) for index in range(1 + draw(10))}
    passing = tuple(draw(largest) for _ in range(levels))
    importance = {name: draw(200) / 8 - 3 for name in tensors}
    return importance, BackwardFlops(tensors, passing)


@pytest.mark.parametrize("seed", range(60))
def test_the_choice_is_the_best_there_is(seed):
    importance, flops = random_case(seed, largest=12)
    for share in (0.05, 0.2, 0.4, 0.7, 1.0):
        budget = max(1, int(share * flops.full))
        chosen = select_tensors(importance, flops, budget, quanta=budget)  # one unit is one FLOP: no rounding
        assert flops.of(chosen) <= budget
        assert sum(importance[name] for name in chosen) == best_by_trying(importance, flops, budget)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("quanta", [1, 7, 50])
def test_rounding_never_exceeds_the_budget_and_finds_all_that_fits_with_it(seed, quanta):
    importance, flops = random_case(seed, largest=10**12)
    budget = max(1, int(0.6 * flops.full))
    chosen = select_tensors(importance, flops, budget, quanta)
    assert flops.of(chosen) <= budget
    # Whatever fits even when each tensor costs a unit more has been considered.
    unit = -(-budget // quanta)
    dearer = {name: TensorCost(cost.level, cost.weight_gradient + unit) for name, cost in flops.tensors.items()}
    reachable = best_by_trying(importance, BackwardFlops(dearer, flops.activation_gradients), budget - unit)
    assert sum(importance[name] for name in chosen) >= reachable


@pytest.mark.parametrize("quanta", [1, 7, 50])
def test_the_whole_budget_chooses_all_that_is_worth_anything(quanta):
    for seed in range(20):
        importance, flops = random_case(seed, largest=10**12)
        positive = {name for name, value in importance.items() if value > 0}
        assert select_tensors(importance, flops, max(1, flops.full), quanta) == positive


def test_the_order_of_the_tensors_makes_no_difference():
    for seed in range(20):
        importance, flops = random_case(seed, largest=12)
        importance = {name: float(int(value)) for name, value in importance.items()}  # many equals
        turned = BackwardFlops(dict(reversed(flops.tensors.items())), flops.activation_gradients)
        budget = max(1, flops.full // 2)
        assert select_tensors(importance, flops, budget) == select_tensors(importance, turned, budget)


def test_passing_gradients_down_is_paid_once_and_only_for_the_lowest():
    flops = BackwardFlops({"low": TensorCost(0, 1), "middle": TensorCost(1, 1), "high": TensorCost(2, 1)}, (50, 10, 10))
    importance = {"low": 5.0, "middle": 4.0, "high": 3.0}
    assert select_tensors(importance, flops, 2) == {"high"}
    assert select_tensors(importance, flops, 12) == {"middle", "high"}
    assert select_tensors(importance, flops, 22) == {"low", "middle"}
    assert select_tensors(importance, flops, 23) == {"low", "middle", "high"}
    assert flops.full == 23, "the first level's own input needs no gradient"


def test_nothing_fits_or_nothing_is_worth_it():
    flops = BackwardFlops({"a": TensorCost(0, 10)}, (0,))
    assert select_tensors({"a": 1.0}, flops, 9) == frozenset()
    assert select_tensors({"a": 0.0}, flops, 10) == frozenset()
    assert select_tensors({"a": -1.0}, flops, 10) == frozenset()
    assert select_tensors({}, BackwardFlops({}, ()), 1) == frozenset()


@pytest.mark.parametrize(
    ("importance", "budget", "quanta", "message"),
    [
        ({}, 1, 1, "importance must hold every tensor of flops, and has no 'a'"),
        ({"a": float("nan")}, 1, 1, "importance of 'a' must be finite, got nan"),
        ({"a": float("inf")}, 1, 1, "importance of 'a' must be finite, got inf"),
        ({"a": 1.0}, 0, 1, "budget and quanta must be at least 1, got 0 and 1"),
        ({"a": 1.0}, 1, 0, "budget and quanta must be at least 1, got 1 and 0"),
    ],
)
def test_bad_arguments_are_refused(importance, budget, quanta, message):
    with pytest.raises(ValueError, match=message):
        select_tensors(importance, BackwardFlops({"a": TensorCost(0, 1)}, (0,)), budget, quanta)
