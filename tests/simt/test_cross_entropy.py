"""Cross entropy of rows of logits in the executor: any vocabulary, labels that are none, infinities, any order.

What every backend must do is in tests/cross_entropy.
"""

from __future__ import annotations

import pytest
import torch

from peft_kernels.reference.cross_entropy import cross_entropy_rows_ as reference

from ..support.accuracy import assert_accurate, assert_same_bits
from . import build
from .test_token_elimination import EACH_DTYPE, normal, simulated

__all__ = ["simulated"]

INFINITY = float("inf")


def run(operator, logits, labels, scale):
    logits = logits.clone()
    return operator(logits, labels, scale), logits


def check(simulated, logits, labels, scale=1.0):
    losses, grad = run(simulated.cross_entropy_rows_, logits, labels, scale)
    own, exact = run(reference, logits, labels, scale), run(reference, logits.double(), labels, scale)
    assert losses.dtype == torch.float32
    assert_accurate(losses, own[0], exact[0], "losses")
    assert_accurate(grad, own[1], exact[1], "gradient")
    unlabeled = labels < 0
    assert not losses[unlabeled].any() and not grad[unlabeled].any()
    return losses, grad


@EACH_DTYPE
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 64, 1003, 8192, 8200, 33001])
def test_any_vocabulary(simulated, dtype, columns):
    logits = 3 * normal(3, columns, dtype=dtype)
    check(simulated, logits, torch.tensor([0, -100, columns - 1]), 0.25)


@EACH_DTYPE
def test_large_logits(simulated, dtype):
    logits = normal(6, 50, dtype=dtype)
    logits[0] += 1000
    logits[1] -= 1000
    logits[2, 7] = 500.0
    logits[3, 7] = -500.0
    check(simulated, logits, torch.tensor([3, 3, 7, 7, 0, 49]))


@EACH_DTYPE
def test_infinities_and_nan_go_where_the_definition_puts_them(simulated, dtype):
    logits = normal(5, 40, dtype=dtype)
    logits[0, :39] = -INFINITY
    logits[1] = -INFINITY
    logits[2, 5] = INFINITY
    logits[3, 6] = float("nan")
    logits[4, ::2] = -INFINITY
    labels = torch.tensor([39, 0, 1, 2, 3])
    losses, grad = run(simulated.cross_entropy_rows_, logits, labels, 1.0)
    expected = run(reference, logits, labels, 1.0)
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(grad.float(), expected[1].float(), rtol=1e-2, atol=1e-6, equal_nan=True)


@EACH_DTYPE
def test_strides_and_alignment_change_no_bits(simulated, dtype):
    logits, labels = normal(5, 77, dtype=dtype), torch.tensor([0, 76, -1, 33, 8])
    losses, grad = run(simulated.cross_entropy_rows_, logits, labels, 0.5)
    for before, behind in ((1, 0), (3, 2), (0, 19), (16, 3)):
        memory = torch.full((5, before + 77 + behind), 9.0, dtype=dtype)
        placed = memory[:, before : before + 77]
        placed.copy_(logits)
        spaced = torch.stack([labels, labels], 1).flatten()[::2]
        assert_same_bits(simulated.cross_entropy_rows_(placed, spaced, 0.5), losses)
        assert_same_bits(placed, grad)
        assert bool((memory[:, :before] == 9.0).all() and (memory[:, before + 77 :] == 9.0).all())


@EACH_DTYPE
def test_any_order_of_blocks_warps_and_lanes_gives_the_same_bits(simulated, dtype):
    logits, labels = normal(4, 20000, dtype=dtype), torch.tensor([5, 19999, -100, 7])
    first = run(simulated.cross_entropy_rows_, logits, labels, 1.0)
    for seed in (1, 2):
        build.set_seed(seed)
        for actual, expected in zip(run(simulated.cross_entropy_rows_, logits, labels, 1.0), first, strict=True):
            assert_same_bits(actual, expected)


def test_a_label_beyond_the_vocabulary_has_no_loss_and_reads_nothing(simulated):
    losses = simulated.cross_entropy_rows_(torch.zeros(2, 8), torch.tensor([8, 7]), 1.0)
    assert bool(losses[0].isnan()) and not bool(losses[1].isnan())


def test_no_rows(simulated):
    assert simulated.cross_entropy_rows_(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64), 1.0).shape == (0,)


def test_bad_arguments_are_named(simulated):
    logits, labels = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)
    calls = {
        r"logits must be float32, bfloat16 or float16, got float64": (logits.double(), labels),
        r"logits must be \[C, V >= 1\] with contiguous rows, .* strides \[1, 3\]": (logits.view(8, 3).t(), labels),
        r"logits must have rows apart from each other": (logits[:1].expand(3, 8), labels),
        r"labels must be int64 \[3\], got int32": (logits, labels.int()),
        r"labels must be int64 \[3\], got int64 \[2\]": (logits, labels[:2]),
    }
    for message, arguments in calls.items():
        with pytest.raises(RuntimeError, match=f"cross_entropy_rows_: {message}"):
            simulated.cross_entropy_rows_(*arguments, 1.0)
