"""The numbers of a report: memory, medians, learning rates, shared weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from peft_kernels.training.arms import OURS, PEFT, Arm, StepRecord, copy_sharing_parameters, learning_rate
from peft_kernels.training.loop import step_seed
from peft_kernels.training.memory import peak_of_profile
from peft_kernels.training.metrics import curve_difference, results_rows, summarize
from peft_kernels.training.models import byte_tokenizer
from peft_kernels.training.settings import Settings


def arm(name: str, seconds: list[float], losses: list[float], warm_up: int = 1) -> Arm:
    """An arm with a history and one parameter of six values."""
    weight = nn.Parameter(torch.zeros(2, 3))
    history = [
        StepRecord(step, loss, time, step >= warm_up)
        for step, (time, loss) in enumerate(zip(seconds, losses, strict=True))
    ]
    return Arm(name, nn.Identity(), {"weight": weight}, torch.optim.SGD([weight]), history)


def test_peak_is_the_most_bytes_held_at_once() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        first = torch.empty(1000, dtype=torch.float32)
        second = torch.empty(3000, dtype=torch.float32)
        del first
        third = torch.empty(500, dtype=torch.float32)
        del second, third
    assert peak_of_profile(profile) == 4 * 4000


def test_peak_counts_nothing_that_was_there_before() -> None:
    before = torch.empty(100_000)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        small = torch.empty(16, dtype=torch.float32)
        del before, small
    assert peak_of_profile(profile) == 64


def test_summary_leaves_warm_up_out() -> None:
    summary = summarize(arm(OURS, [9.0, 1.0, 2.0, 3.0], [4.0, 3.0, 2.0, 1.0]), 100, 1.5, 7)
    assert summary.seconds_per_step == 2.0
    assert summary.seconds_spread == (1.5, 2.5)
    assert summary.tokens_per_second == 50.0
    assert summary.final_loss == 2.5
    assert summary.trained_parameters == 6


def test_final_loss_is_the_mean_of_the_last_ten_steps() -> None:
    losses = [100.0] * 5 + [1.0] * 10
    assert summarize(arm(OURS, [1.0] * 15, losses), 1, None, 0).final_loss == 1.0


def test_ratios_divide_ours_by_theirs() -> None:
    ours = summarize(arm(OURS, [1.0, 1.0], [1.0, 1.0]), 100, None, 50)
    theirs = summarize(arm(PEFT, [1.0, 2.0], [2.0, 2.0]), 100, None, 100)
    rows = {row.label.strip(): row for row in results_rows([theirs, ours])}
    assert rows["tokens per second"].ratio == "2.000"
    assert rows["seconds per step, median"].cells == ("2.000", "1.000")
    assert rows["seconds per step, median"].ratio == "0.500"
    assert rows["peak memory of a step, MiB"].ratio == "0.500"
    assert "held-out loss" not in rows
    assert results_rows([ours])[0].ratio is None


def test_curve_difference_is_relative_to_the_other_arm() -> None:
    ours, theirs = arm(OURS, [1.0] * 2, [1.0, 2.2]), arm(PEFT, [1.0] * 2, [1.0, 2.0])
    assert curve_difference([ours, theirs]) == pytest.approx(0.1)
    assert curve_difference([ours]) is None


def test_copy_shares_parameters_and_buffers_but_not_structure() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    copy = copy_sharing_parameters(model)
    for (name, mine), (other_name, theirs) in zip(
        model.state_dict(keep_vars=True).items(), copy.state_dict(keep_vars=True).items(), strict=True
    ):
        assert name == other_name and mine is theirs
    copy[0] = nn.Identity()
    assert isinstance(model[0], nn.Linear)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 0.5 * (1 + math.sqrt(0.5)), 0.5, 0.5 * (1 - math.sqrt(0.5))]),
    ],
)
def test_learning_rates_follow_the_schedule(schedule: str, expected: list[float]) -> None:
    settings = Settings(lr=1.0, lr_schedule=schedule, steps=5, warmup_steps=1)
    assert [learning_rate(settings, step) for step in range(5)] == pytest.approx(expected)


def test_every_step_has_a_seed_of_its_own() -> None:
    assert len({step_seed(seed, step) for seed in range(3) for step in range(1000)}) == 3000


def test_byte_tokenizer_returns_any_text() -> None:
    tokenizer = byte_tokenizer()
    text = "def f(x):\n\treturn  'é→😀'  # \x00\r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) == len(text.encode())
