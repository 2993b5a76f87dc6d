"""Scores of blocks of tokens in the executor: edges of tiles and blocks, shared heads, documents, strides and orders.

What every backend must do is in tests/token_selection.
"""

from __future__ import annotations

import pytest
import torch

from peft_kernels.reference.token_selection import block_scores as reference

from ..support.accuracy import assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from . import build
from .test_token_elimination import EACH_DTYPE, simulated

__all__ = ["simulated"]


def integers(*shape, dtype):
    """Of which every sum is exact."""
    return torch.randint(-2, 3, shape).to(dtype)


def assert_exact(simulated, q, k, block_size, starts=None, expected_of=None):
    exact = (q, k) if expected_of is None else expected_of
    expected = reference(*(tensor.double() for tensor in exact), block_size, starts).float()
    assert_same_bits(simulated.block_scores(q, k, block_size, starts), expected)
    return expected


@EACH_DTYPE
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128, 200])
def test_blocks_of_one_tile(simulated, dtype, tokens):
    q, k = integers(1, 2, tokens, 24, dtype=dtype), integers(1, 2, tokens, 24, dtype=dtype)
    assert_exact(simulated, q, k, 64)


@EACH_DTYPE
@pytest.mark.parametrize("block_size", [1, 2, 7, 13, 16, 17, 32, 33, 48, 100, 128])
def test_blocks_across_tiles(simulated, dtype, block_size):
    q, k = integers(2, 2, 150, 16, dtype=dtype), integers(2, 2, 150, 16, dtype=dtype)
    assert_exact(simulated, q, k, block_size)


@EACH_DTYPE
@pytest.mark.parametrize("width", [1, 8, 31, 33, 64, 80, 130])
@pytest.mark.parametrize(("heads", "shared"), [(1, 1), (4, 1), (6, 2), (5, 5)])
def test_heads_of_any_width_and_number(simulated, dtype, width, heads, shared):
    q, k = integers(1, heads, 70, width, dtype=dtype), integers(1, heads // shared, 70, width, dtype=dtype)
    assert_exact(simulated, q, k, 32)


# A tile of whole blocks adds its blocks of queries; where no whole blocks fill it, there are as few as of 17 tokens.
@pytest.mark.parametrize(("block_size", "rows"), [(1, 4), (13, 5), (16, 4), (32, 4), (64, 4), (17, 15), (100, 3)])
def test_scratch_has_a_row_for_each_tile_of_queries(simulated, block_size, rows):
    q = integers(1, 1, 241, 8, dtype=torch.float16)
    with torch.profiler.profile(profile_memory=True) as profile:
        simulated.block_scores(q, q, block_size, None)
    taken = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    scores = 4 * (241 // block_size)
    assert sum(size for size in taken if size > 0) == (rows + 1) * scores


@EACH_DTYPE
@pytest.mark.parametrize("block_size", [1, 5, 16, 20, 64])
def test_documents_and_padding_are_told_apart(simulated, dtype, block_size):
    q, k = integers(2, 2, 140, 16, dtype=dtype), integers(2, 1, 140, 16, dtype=dtype)
    position = torch.arange(140, dtype=torch.int32)
    starts = torch.stack([position // 45 * 45, torch.where(position < 20, position + 1, 20)]).int()
    for layout in ("contiguous", "transposed"):
        assert_exact(simulated, q, k, block_size, laid_out(starts, layout))


@EACH_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(simulated, dtype, layout):
    q, k = integers(2, 2, 70, 32, dtype=dtype), integers(2, 2, 70, 32, dtype=dtype)
    assert_exact(simulated, laid_out(q, layout), laid_out(k, layout), 64, expected_of=(q, k))
    tokens_first = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k)]
    assert_exact(simulated, *tokens_first, 64, expected_of=(q, k))


@EACH_DTYPE
def test_sums_are_accurate(simulated, dtype):
    q, k = (torch.randn(1, 4, 200, 96, dtype=torch.float64).to(dtype) for _ in range(2))
    exact = reference(q.double(), k.double(), 50, None)
    scores = simulated.block_scores(q, k, 50, None)
    assert scores.dtype == torch.float32
    # Tensor cores cut off what PyTorch rounds, and float loses the product of its two small terms.
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=0.0)


@EACH_DTYPE
def test_any_order_of_blocks_warps_and_lanes_gives_the_same_bits(simulated, dtype):
    q, k = (torch.randn(2, 3, 150, 40, dtype=torch.float64).to(dtype) for _ in range(2))
    for block_size in (64, 20, 3):
        first = simulated.block_scores(q, k, block_size, None)
        for seed in (1, 2):
            build.set_seed(seed)
            assert_same_bits(simulated.block_scores(q, k, block_size, None), first)


def test_nan_is_not_hidden(simulated):
    q = k = torch.ones(1, 1, 128, 8)
    q = q.clone()
    q[0, 0, 100, 3] = float("nan")
    assert simulated.block_scores(q, k, 64, None).isnan().all()
    q = -torch.ones(1, 1, 128, 8)
    assert not simulated.block_scores(q, k, 64, None).any()


@pytest.mark.parametrize("shape", [(0, 2, 64, 8), (2, 2, 63, 8), (1, 0, 64, 8), (1, 2, 64, 0)])
def test_nothing_to_score(simulated, shape):
    q, k = torch.ones(shape), torch.ones(shape[0], max(1, shape[1]), *shape[2:])
    assert_same_bits(simulated.block_scores(q, k, 64, None), torch.zeros(shape[0], shape[2] // 64))


def test_bad_arguments_are_named(simulated):
    q = torch.zeros(1, 4, 8, 2)
    calls = {
        r"q must be \[B, heads, T, D\]": (q[0], q, 4, None),
        r"q must be float32, bfloat16 or float16, got float64": (q.double(), q.double(), 4, None),
        r"k must have the activations' dtype, float32, got float16": (q, q.half(), 4, None),
        r"k must have a number of heads that divides q's, 4, got float32 \[1, 3": (q, q[:, :3], 4, None),
        r"block_size must be at least 1, got 0": (q, q, 0, None),
        r"starts must be int32 \[1, 8\], got int32 \[1, 7": (q, q, 4, torch.zeros(1, 7, dtype=torch.int32)),
        r"starts must be int32": (q, q, 4, torch.zeros(1, 8)),
    }
    for message, arguments in calls.items():
        with pytest.raises(RuntimeError, match=f"block_scores: {message}"):
            simulated.block_scores(*arguments)
