"""The harness measures what it says: order, warm-up, what is timed, and the ratios."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Arm, Plan, interleave, order, rotation, spread, summarize

ONE_ROUND = Plan(warmup=1, min_rounds=1, max_rounds=1, seconds=0.0)


class Clock:
    """Stands in for the wall clock: time passes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(harness.time, "perf_counter", fake.perf_counter)
    return fake


@pytest.mark.parametrize("arms", [1, 2, 3, 5])
def test_every_arm_runs_once_a_round_and_as_often_first_as_the_others(arms: int) -> None:
    rounds = [order(i, arms) for i in range(2 * arms)]
    assert all(sorted(one) == list(range(arms)) for one in rounds)
    assert set(Counter(one[0] for one in rounds).values()) == {2}


def test_no_arm_always_follows_the_same_neighbour() -> None:
    followers = {(first, second) for i in range(6) for first, second in zip(order(i, 3), order(i, 3)[1:], strict=False)}
    assert followers == {(a, b) for a in range(3) for b in range(3) if a != b}


def test_only_run_is_timed(clock: Clock) -> None:
    arm = Arm("a", run=lambda _: clock.spend(2.0), prepare=lambda: clock.spend(100.0))
    assert interleave([arm], ONE_ROUND) == {"a": [2.0]}


def test_warmup_rounds_are_dropped_and_inputs_rotate_through_them(clock: Clock) -> None:
    seen: list[int] = []

    def run(i: int) -> None:
        seen.append(i)
        clock.spend(1.0 + i)

    samples = interleave([Arm("a", run)], Plan(warmup=2, min_rounds=3, max_rounds=3, seconds=0.0))
    assert seen == [0, 1, 2, 3, 4]
    assert samples == {"a": [3.0, 4.0, 5.0]}


def test_rounds_stop_when_the_time_is_used_up(clock: Clock) -> None:
    arms = [Arm(name, lambda _: clock.spend(1.0)) for name in "ab"]
    samples = interleave(arms, Plan(warmup=1, min_rounds=2, max_rounds=50, seconds=10.0))
    assert [len(values) for values in samples.values()] == [5, 5]


def test_arms_need_distinct_names() -> None:
    arm = Arm("a", lambda _: None)
    with pytest.raises(ValueError, match="distinct names"):
        interleave([arm, arm], ONE_ROUND)
    with pytest.raises(ValueError, match="at least one"):
        interleave([], ONE_ROUND)


def test_a_plan_without_warmup_or_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup must be at least 1"):
        Plan(warmup=0)
    with pytest.raises(ValueError, match="min_rounds <= max_rounds"):
        Plan(min_rounds=5, max_rounds=4)


def test_summary_gives_the_ratio_of_medians_and_the_median_of_ratios() -> None:
    # The machine slows down fourfold in the last round; the per-round ratio does not notice.
    summary = summarize({"base": [1.0, 2.0, 8.0], "arm": [3.0, 4.0, 24.0]}, ["base", "not measured"])
    assert summary["arm"]["median_s"] == 4.0
    assert summary["arm"]["rounds"] == 3
    ratio = summary["arm"]["relative_to"]["base"]
    assert ratio == {"ratio_of_medians": 2.0, "median_of_ratios": 3.0, "q1": 2.5, "q3": 3.0}
    assert summary["base"]["relative_to"] == {}


def test_spread_of_one_sample_is_that_sample() -> None:
    assert spread([7.0]) == (7.0, 7.0, 7.0)


def test_rotated_inputs_are_distinct_tensors() -> None:
    inputs = rotation(lambda i: torch.full((4,), float(i + 1)), "cpu")
    assert len(inputs) > 1
    assert len({x.data_ptr() for x in inputs}) == len(inputs)
    assert all(x.any() for x in inputs)
