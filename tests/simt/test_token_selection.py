"""Selection of blocks of tokens in the executor: ties, NaN, zeros of both signs, thresholds, any strides and orders.

What every backend must do is in tests/token_selection.
"""

from __future__ import annotations

import pytest
import torch

from peft_kernels.reference import token_selection as reference

from ..support.accuracy import assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from . import build
from .test_token_elimination import simulated

__all__ = ["simulated"]

NAN, INFINITY = float("nan"), float("inf")


def check(simulated, scores, tokens, blocks, block_size, threshold=None, expected_of=None):
    exact = scores if expected_of is None else expected_of
    arguments = (tokens, blocks, block_size, None if threshold is None else torch.tensor(threshold))
    positions, counts = simulated.select_tokens(scores, *arguments)
    expected = reference.select_tokens(exact, *arguments)
    assert_same_bits(positions, expected[0], f"positions of {blocks} blocks")
    assert_same_bits(counts, expected[1], f"counts of {blocks} blocks")
    return int(counts.sum())


@pytest.mark.parametrize("total", [1, 2, 31, 32, 33, 1023, 1024, 1025, 2500])
@pytest.mark.parametrize("kind", ["random", "ties", "equal"])
def test_the_largest_scores(simulated, total, kind):
    scores = torch.randn(2, total)
    if kind != "random":
        scores = (2 * scores).round() if kind == "ties" else torch.zeros(2, total)
    for blocks in {0, 1, total // 3, total - 1, total}:
        check(simulated, scores, 3 * total + 2, blocks, 3)


@pytest.mark.parametrize(("block_size", "tail"), [(1, 0), (2, 1), (64, 0), (64, 63)])
def test_blocks_and_what_is_left_of_the_last(simulated, block_size, tail):
    scores = torch.randn(3, 21)
    for blocks in (0, 1, 8, 21):
        check(simulated, scores, 21 * block_size + tail, blocks, block_size)


def test_numbers_with_the_order_of_no_bits(simulated):
    special = [NAN, -NAN, INFINITY, -INFINITY, 0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 3e38, -3e38, 1.0, -1.0]
    scores = torch.tensor(special)[torch.stack([torch.randperm(28) % 14 for _ in range(5)])]
    for blocks in range(29):
        check(simulated, scores, 28, blocks, 1)


@pytest.mark.parametrize("threshold", [-INFINITY, -1.0, -0.0, 0.0, 0.3, 2.0, 1e30, INFINITY, NAN])
def test_thresholds(simulated, threshold):
    scores = torch.randn(6, 57)
    scores[1] = scores[1].round()
    scores[2, ::5] = NAN
    scores[3] = -0.0
    scores[4] = INFINITY
    kept = [check(simulated, scores, 57 * 4 + 3, blocks, 4, threshold) for blocks in (0, 1, 20, 56, 57)]
    assert kept == sorted(kept)


def test_a_threshold_is_read_where_it_is(simulated):
    scores = torch.tensor([[3.0, 1.0, 2.0, 5.0]])
    _, counts = simulated.select_tokens(scores, 4, 3, 1, torch.tensor([9.0, 2.5])[1])
    assert counts.tolist() == [2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(simulated, layout):
    scores = torch.randn(3, 70)
    check(simulated, laid_out(scores, layout), 140, 30, 2, expected_of=scores)


def test_any_order_of_blocks_warps_and_lanes_gives_the_same_bits(simulated):
    scores = torch.randn(3, 1500).mul(20).round()
    for seed in range(3):
        build.set_seed(seed)
        check(simulated, scores, 3001, 400, 2)


@pytest.mark.parametrize(("sequences", "tokens"), [(0, 12), (2, 0), (2, 3)])
def test_nothing_to_choose_from(simulated, sequences, tokens):
    check(simulated, torch.zeros(sequences, tokens // 4), tokens, 0, 4)


def test_bad_arguments_are_named(simulated):
    scores = torch.zeros(2, 3)
    calls = {
        r"scores must be float32, got float64": (scores.double(), 12, 1, 4, None),
        r"scores must be \[B, 3\], got float32 \[3\]": (scores[0], 12, 1, 4, None),
        r"scores must be \[B, 4\], got float32 \[2, 3\]": (scores, 16, 1, 4, None),
        r"block_size must be at least 1, got 0": (scores, 12, 1, 0, None),
        r"tokens must be in \[0, 2\^31\), as positions are int32, got -1": (scores, -1, 1, 4, None),
        r"blocks must be in \[0, 3\], got 4": (scores, 12, 4, 4, None),
        r"threshold must be a scalar in scores' dtype, float32, got float32 \[2\]": (scores, 12, 1, 4, torch.zeros(2)),
        r"threshold must be a scalar in scores' dtype, float32, got float64": (
            *(scores, 12, 1, 4),
            torch.zeros((), dtype=torch.float64),
        ),
    }
    for message, arguments in calls.items():
        with pytest.raises(RuntimeError, match=f"select_tokens: {message}"):
            simulated.select_tokens(*arguments)
