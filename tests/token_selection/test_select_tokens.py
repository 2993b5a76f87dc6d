"""`select_tokens` and `flat_rows`: exact positions for ties, NaN, every ratio and threshold."""

from __future__ import annotations

import math

import pytest
import torch

from peft_kernels import backends, ops

from ..support.layouts import LAYOUTS, laid_out
from ..support.places import places_and_dtypes

OPERATOR = "select_tokens"
DTYPES = (torch.float32, torch.float64)
EACH_PLACE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(OPERATOR, dtypes=DTYPES))
NAN, INFINITY = float("nan"), float("inf")


def expected_positions(scores, tokens, blocks, block_size, threshold=None):
    """Lists of positions, one per sequence, by sorting in Python."""
    found = []
    for row in scores.tolist():
        keys = [(0 if math.isnan(score) else 1, 0.0 if math.isnan(score) else -score, b) for b, score in enumerate(row)]
        chosen = sorted(key[2] for key in sorted(keys)[:blocks])
        if threshold is not None:
            chosen = [b for b in chosen if math.isnan(row[b]) or row[b] >= threshold]
        inside = [b * block_size + i for b in chosen for i in range(block_size)]
        found.append(inside + list(range(tokens - tokens % block_size, tokens)))
    return found


def assert_selected(result, expected, size):
    positions, counts = result
    assert positions.dtype == counts.dtype == torch.int32
    assert positions.shape == (len(expected), size)
    assert counts.tolist() == [len(row) for row in expected]
    assert positions.tolist() == [row + [-1] * (size - len(row)) for row in expected]


def some_scores(kind, batch, total):
    if kind == "ties":
        return torch.randint(0, 3, (batch, total)).double()
    scores = torch.randn(batch, total, dtype=torch.float64)
    if kind == "special" and total > 0:
        for value in (NAN, INFINITY, -INFINITY, -0.0, 0.0, NAN):
            scores[torch.arange(batch), torch.randint(0, total, (batch,))] = value
    return scores


@EACH_PLACE
@pytest.mark.parametrize("kind", ["random", "ties", "special"])
@pytest.mark.parametrize(
    "size", [(0, 9, 2), (2, 0, 4), (3, 5, 64), (2, 9, 1), (3, 77, 7), (1, 640, 64), (2, 700, 3)], ids=str
)
def test_exact_positions_of_any_number_of_blocks(place, dtype, kind, size):
    batch, tokens, block_size = size
    total = tokens // block_size
    scores = some_scores(kind, batch, total).to(dtype)
    kernel = place.kernel(OPERATOR, dtype)
    for blocks in sorted({0, min(1, total), total // 2, max(0, total - 1), total}):
        result = kernel(scores.to(place.device), tokens, blocks, block_size, None)
        expected = expected_positions(scores, tokens, blocks, block_size)
        assert_selected(result, expected, blocks * block_size + tokens % block_size)


@EACH_PLACE
@pytest.mark.parametrize("threshold", [-INFINITY, -0.5, 0.0, 1.0, INFINITY])
@pytest.mark.parametrize("kind", ["random", "ties", "special"])
def test_exact_positions_above_a_threshold(place, dtype, threshold, kind):
    scores = some_scores(kind, 3, 12).to(dtype)
    limit = torch.tensor(threshold, dtype=dtype, device=place.device)
    for blocks in (0, 5, 12):
        result = place.kernel(OPERATOR, dtype)(scores.to(place.device), 62, blocks, 5, limit)
        assert_selected(result, expected_positions(scores, 62, blocks, 5, threshold), 5 * blocks + 2)


@EACH_PLACE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exact_positions_for_any_strides(place, dtype, layout):
    scores = torch.randn(3, 20, dtype=dtype)
    result = place.kernel(OPERATOR, dtype)(laid_out(scores.to(place.device), layout), 41, 7, 2, None)
    assert_selected(result, expected_positions(scores, 41, 7, 2), 15)


@pytest.mark.parametrize("dtype", backends.DTYPES)
@pytest.mark.parametrize("tokens", [0, 5, 16, 77])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.7, 1.0, 1])
def test_scores_of_tokens_and_of_blocks(dtype, tokens, keep):
    scores = torch.randn(2, tokens).to(dtype)
    total = tokens // 8
    by_block = scores[:, : 8 * total].reshape(2, total, 8).float().amax(-1) if total else torch.zeros(2, 0)
    blocks = math.ceil(keep * total)
    expected = [[], []] if keep == 0 else expected_positions(by_block, tokens, blocks, 8)
    size = ops.kept_tokens(tokens, keep, 8)
    assert_selected(ops.select_tokens(scores, keep, 8), expected, size)
    assert_selected(ops.select_tokens(by_block.to(dtype), keep, 8, tokens=tokens), expected, size)
    if keep == 1:
        assert expected == [list(range(tokens))] * 2


def test_a_token_that_is_nan_has_its_block_kept():
    scores = torch.ones(1, 32)
    scores[0, 21] = NAN
    assert ops.select_tokens(scores, 0.25, 8)[0].tolist() == [list(range(16, 24))]


@pytest.mark.parametrize(
    "limit", [0.5, 1, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.5).bfloat16()]
)
def test_a_threshold_is_a_number_or_a_tensor(limit):
    scores = torch.tensor([[2.0, 0.25, 0.75, 3.0]])
    kept = [0, 3] if limit == 1 else [0, 2, 3]
    positions, counts = ops.select_tokens(scores, 1.0, 1, limit)
    assert positions.tolist() == [kept + [-1] * (4 - len(kept))] and counts.tolist() == [len(kept)]


def test_the_ratio_caps_what_a_threshold_keeps():
    scores = torch.arange(10.0).repeat_interleave(4)[None]
    positions, counts = ops.select_tokens(scores, 0.3, 4, 1.0)
    assert positions.tolist() == [list(range(28, 40))] and counts.tolist() == [12]


def test_scores_get_no_gradient():
    scores = torch.randn(1, 32, requires_grad=True)
    positions, _ = ops.select_tokens(scores, 0.5, 8, torch.tensor(0.0, requires_grad=True))
    assert not positions.requires_grad


@pytest.mark.parametrize(
    ("tokens", "keep", "block_size", "kept"),
    [
        (640, 0.7, 64, 448),
        (640, 0.1, 64, 64),
        (641, 0.1, 64, 65),
        (640, 0.11, 64, 128),
        (63, 0.5, 64, 63),
        (64, 0, 64, 0),
    ],
)
def test_kept_tokens(tokens, keep, block_size, kept):
    assert ops.kept_tokens(tokens, keep, block_size) == kept


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10.5, 0.5, 4), TypeError, "tokens must be an integer, got 10.5"),
        ((True, 0.5, 4), TypeError, "tokens must be an integer, got True"),
        ((-1, 0.5, 4), ValueError, "tokens must not be negative, got -1"),
        ((10, 2.0, 4), ValueError, r"keep must be a ratio in \[0, 1\], got 2.0"),
        ((10, 0.5, 4.0), TypeError, "block_size must be an integer, got 4.0"),
    ],
)
def test_kept_tokens_refuses(arguments, error, message):
    with pytest.raises(error, match=f"kept_tokens: {message}"):
        ops.kept_tokens(*arguments)


def test_a_product_above_an_integer_by_rounding_is_that_integer():
    for total in range(1, 200):
        for blocks in range(total + 1):
            assert ops.kept_tokens(total, blocks / total, 1) == blocks


def test_flat_rows():
    positions = torch.tensor([[0, 2, 4], [1, -1, -1], [3, 4, -5]], dtype=torch.int32)
    rows = ops.flat_rows(positions, 5)
    assert rows.dtype == torch.int32 and rows.tolist() == [0, 2, 4, 6, -1, -1, 13, 14, -1]
    assert ops.flat_rows(positions[:0], 5).shape == ops.flat_rows(positions[:, :0], 5).shape == (0,)


def test_rows_gather_what_positions_name():
    x, scores = torch.randn(3, 20, 4), torch.randn(3, 20)
    positions, _ = ops.select_tokens(scores, 0.5, 3, 0.9)
    gathered = ops.gather_rows(x, ops.flat_rows(positions, 20)).view(3, -1, 4)
    for b in range(3):
        for s, position in enumerate(positions[b].tolist()):
            assert torch.equal(gathered[b, s], torch.zeros(4) if position < 0 else x[b, position])


CASES = [
    ({"keep": -0.1}, ValueError, r"keep must be a ratio in \[0, 1\], got -0.1"),
    ({"keep": 1.5}, ValueError, r"keep must be a ratio in \[0, 1\], got 1.5"),
    ({"keep": NAN}, ValueError, r"keep must be a ratio in \[0, 1\], got nan"),
    ({"keep": "half"}, TypeError, "keep must be a number, got 'half'"),
    ({"keep": True}, TypeError, "keep must be a number, got True"),
    ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
    ({"block_size": 4.0}, TypeError, "block_size must be an integer, got 4.0"),
    ({"scores": torch.ones(9)}, ValueError, r"scores must be 2-D, got float32 \[9\]"),
    ({"scores": torch.ones(2, 9).int()}, TypeError, r"scores must be float32, .*, got int32 \[2, 9\]"),
    ({"tokens": 9}, ValueError, r"scores must be \[B, 9 // 4\] for 9 tokens, got float32 \[2, 9\]"),
    ({"tokens": -1}, ValueError, "tokens must not be negative, got -1"),
    ({"tokens": 10.5}, TypeError, "tokens must be an integer, got 10.5"),
    ({"threshold": NAN}, ValueError, "threshold must not be NaN"),
    ({"threshold": "high"}, TypeError, "threshold must be a number or a 0-d tensor, got 'high'"),
    ({"threshold": torch.ones(1)}, ValueError, r"threshold must be .* a floating 0-d tensor, got float32 \[1\]"),
    ({"threshold": torch.tensor(1)}, ValueError, r"threshold must be .* a floating 0-d tensor, got int64 \[\]"),
    ({"threshold": torch.ones((), device="meta")}, ValueError, "threshold must be on scores' device, cpu, got"),
]


@pytest.mark.parametrize(("changes", "error", "message"), CASES)
def test_message_names_argument_expectation_and_what_came(changes, error, message):
    arguments = {"scores": torch.ones(2, 9), "keep": 0.5, "block_size": 4, **changes}
    with pytest.raises(error, match=f"select_tokens: {message}"):
        ops.select_tokens(**arguments)


@pytest.mark.parametrize(
    ("positions", "tokens", "error", "message"),
    [
        (torch.zeros(3).int(), 4, ValueError, r"positions must be \[B, S\], got int32 \[3\]"),
        (torch.zeros(1, 3).long(), 4, TypeError, r"positions must be int32, got int64 \[1, 3\]"),
        (torch.zeros(1, 3).int(), -4, ValueError, "tokens must not be negative, got -4"),
        (torch.zeros(1, 3).int(), 4.5, TypeError, "tokens must be an integer, got 4.5"),
        (torch.zeros(2, 3).int(), 2**30, ValueError, r"rows must be fewer than 2\^31 to be int32, got 2 x 1073741824"),
    ],
)
def test_flat_rows_refuses(positions, tokens, error, message):
    with pytest.raises(error, match=f"flat_rows: {message}"):
        ops.flat_rows(positions, tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.ones(2, 3).half()}, r"scores must be float32 or float64, got float16 \[2, 3\]"),
        ({"scores": torch.ones(2, 4)}, r"scores must be \[B, 3\], got float32 \[2, 4\]"),
        ({"scores": torch.ones(3)}, r"scores must be \[B, 3\], got float32 \[3\]"),
        ({"tokens": -1}, r"tokens must be in \[0, 2\^31\), as positions are int32, got -1"),
        ({"tokens": 2**31}, r"tokens must be in \[0, 2\^31\), as positions are int32, got 2147483648"),
        ({"blocks": 4}, r"blocks must be in \[0, 3\], got 4"),
        ({"blocks": -1}, r"blocks must be in \[0, 3\], got -1"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"threshold": torch.ones(1)}, r"threshold must be a scalar in scores' dtype, float32, got float32 \[1\]"),
        ({"threshold": torch.ones(()).double()}, "threshold must be a scalar in scores' dtype, float32, got float64"),
    ],
)
def test_the_compiled_operator_refuses(changes, message):
    arguments = {"scores": torch.ones(2, 3), "tokens": 13, "blocks": 2, "block_size": 4, "threshold": None, **changes}
    with pytest.raises(RuntimeError, match=f"select_tokens: {message}"):
        backends.kernel(OPERATOR, "cpu", torch.float32, "cpu")(*arguments.values())
