"""`block_scores`: every size of blocks, heads and documents, strides, NaN, and the same bits for any threads."""

from __future__ import annotations

import pytest
import torch

import peft_kernels
from peft_kernels import ops
from peft_kernels.reference import token_selection as reference

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.places import places_and_dtypes

OPERATOR = "block_scores"
EACH_PLACE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(OPERATOR))
# B, heads, key_value_heads, T, D, block_size: nothing, less than a block, one head, groups, off-tile sizes, large ones.
SIZES = (
    (0, 2, 1, 9, 8, 4),
    (1, 2, 1, 0, 8, 4),
    (2, 2, 2, 5, 8, 64),
    (1, 1, 1, 1, 1, 1),
    (1, 2, 2, 9, 0, 4),
    (2, 4, 2, 70, 16, 16),
    (1, 3, 1, 67, 33, 5),
    (1, 2, 2, 131, 40, 100),
    (2, 3, 3, 129, 64, 64),
    (1, 9, 3, 200, 64, 64),
)
STARTS = ("none", "packed", "padded", "random")


def operands(batch, heads, key_value_heads, tokens, depth, dtype, device="cpu"):
    q = torch.randn(batch, heads, tokens, depth, dtype=torch.float64).to(dtype).to(device)
    return q, torch.randn(batch, key_value_heads, tokens, depth, dtype=torch.float64).to(dtype).to(device)


def starts_of(kind, batch, tokens, device="cpu"):
    """Where each token's document begins; padding sees nothing."""
    position = torch.arange(tokens).expand(batch, -1)
    if kind == "none":
        return None
    if kind == "packed":
        starts = position // 23 * 23
    elif kind == "padded":  # on the left, by another number of tokens in each sequence
        length = torch.arange(batch)[:, None] * 7 + 3
        starts = torch.where(position < length, position + 1, length)
    else:
        starts = torch.randint(-3, tokens + 4, (batch, tokens))
    return starts.int().contiguous().to(device)


@EACH_PLACE
@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scores_against_the_exact_ones(place, dtype, size, starts):
    *sizes, block_size = size
    q, k = operands(*sizes, dtype, place.device)
    first = starts_of(starts, size[0], size[3], place.device)
    scores = place.kernel(OPERATOR, dtype)(q, k, block_size, first)
    assert scores.shape == (size[0], size[3] // block_size)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    own = reference.block_scores(q, k, block_size, first)
    assert_accurate(scores, own, reference.block_scores(q.double(), k.double(), block_size, first), "scores")


# Queries at once: all, two blocks, one, and less than one.
@pytest.mark.parametrize("queries", [1024, 8, 4, 1])
def test_the_definition_by_loops(monkeypatch, queries):
    monkeypatch.setattr(reference, "_QUERIES", queries)
    batch, heads, groups, tokens, depth, block_size = 2, 4, 2, 11, 3, 4
    q, k = operands(batch, heads, groups, tokens, depth, torch.float64)
    starts = starts_of("packed", batch, tokens) - 1
    expected = torch.zeros(batch, tokens // block_size, dtype=torch.float64)
    for b in range(batch):
        for block in range(tokens // block_size):
            for queries in range(0, tokens, block_size):
                largest = 0.0
                for i in range(queries, min(tokens, queries + block_size)):
                    for j in range(block * block_size, (block + 1) * block_size):
                        if starts[b, i] <= j <= i:
                            score = sum(max(0.0, float(q[b, h, i] @ k[b, h // 2, j])) for h in range(heads))
                            largest = max(largest, score)
                expected[b, block] += largest
    torch.testing.assert_close(reference.block_scores(q, k, block_size, starts), expected)


@EACH_PLACE
@pytest.mark.parametrize("layout", [*LAYOUTS, "heads last", "expanded"])
def test_strides(place, dtype, layout):
    q, k = operands(2, 4, 2, 70, 16, dtype)
    if layout == "expanded":
        q, k = q[:, :1].expand(-1, 4, -1, -1), k[:1].expand(2, -1, -1, -1)
    views = [
        t if layout == "expanded" else heads_last(t) if layout == "heads last" else laid_out(t, layout) for t in (q, k)
    ]
    kernel = place.kernel(OPERATOR, dtype)
    expected = kernel(q.contiguous().to(place.device), k.contiguous().to(place.device), 16, None)
    assert_same_bits(kernel(*(view.to(place.device) for view in views), 16, None), expected)


def heads_last(tensor):
    """`[B, heads, T, D]` as a projection leaves it."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


@EACH_PLACE
@pytest.mark.parametrize("where", ["q", "k"])
def test_nan_shows_in_the_blocks_it_reaches_and_in_no_other(place, dtype, where):
    q, k = operands(1, 2, 1, 150, 16, dtype)
    (q if where == "q" else k)[0, 0, 70, 3] = float("nan")
    scores = place.kernel(OPERATOR, dtype)(q.to(place.device), k.to(place.device), 16, None).cpu()
    # A query sees all blocks up to its own; a key is in one.
    expected = torch.tensor([block <= 70 // 16 if where == "q" else block == 70 // 16 for block in range(9)])
    assert torch.equal(scores[0].isnan(), expected)


@EACH_PLACE
def test_a_future_key_has_no_influence(place, dtype):
    q, k = operands(1, 2, 1, 96, 16, dtype, place.device)
    kernel = place.kernel(OPERATOR, dtype)
    before = kernel(q[:, :, :48], k[:, :, :48], 16, None)  # what follows adds zeros
    starts = torch.arange(96, device=place.device).int()[None] // 48 * 48
    assert_same_bits(kernel(q, k, 16, starts.contiguous())[:, :3], before)


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("place", "dtype"), [case for case in places_and_dtypes(OPERATOR) if case.values[0].backend == "cpu"]
)
def test_same_bits_for_any_number_of_threads(place, dtype, restored_threads):
    q, k = operands(1, 3, 1, 700, 40, dtype)
    results = []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        results.append(place.kernel(OPERATOR, dtype)(q, k, 48, None))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def bytes_taken(call):
    """Of each allocation while it runs."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    found = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [size for size in found if size > 0]


def test_no_gradient_and_nothing_of_the_size_of_all_scores():
    tokens = 1024
    q, k = (tensor.requires_grad_() for tensor in operands(1, 2, 1, tokens, 8, torch.float32))
    with peft_kernels.use_backend("cpu"):
        assert not ops.block_scores(q, k).requires_grad
        assert sum(bytes_taken(lambda: ops.block_scores(q, k))) < 4 * tokens * tokens // 64


# It serves GPUs whose own kernels nobody has verified.
@pytest.mark.parametrize("block_size", [1, 64])
def test_the_definition_holds_a_run_of_queries_of_one_head(monkeypatch, block_size):
    tokens, heads, queries = 1024, 4, 64
    monkeypatch.setattr(reference, "_QUERIES", queries)
    q, k = operands(1, heads, 2, tokens, 8, torch.float32)
    taken = bytes_taken(lambda: reference.block_scores(q, k, block_size, None))
    assert max(taken) <= 4 * queries * tokens  # all pairs of all heads: 4 * heads * tokens^2


CASES = [
    ({"q": lambda t: t[0]}, ValueError, r"q must be \[B, heads, T, D\], got float32 \[4, 9, 8\]"),
    ({"q": torch.Tensor.int}, TypeError, r"q must be float32, .*, got int32 \[2, 4, 9, 8\]"),
    ({"k": lambda t: t[0]}, ValueError, r"k must be \[2, key_value_heads, 9, 8\], got float32 \[2, 9, 8\]"),
    ({"k": lambda t: t[:1]}, ValueError, r"k must be \[2, key_value_heads, 9, 8\], got float32 \[1, 2, 9, 8\]"),
    ({"k": lambda t: t[:, :, 1:]}, ValueError, r"k must be .*, got float32 \[2, 2, 8, 8\]"),
    ({"k": lambda t: t[..., 1:]}, ValueError, r"k must be .*, got float32 \[2, 2, 9, 7\]"),
    ({"k": lambda t: t[:, :0]}, ValueError, "k must have a number of heads that divides q's, 4, got"),
    ({"q": lambda t: t[:, :3]}, ValueError, "k must have a number of heads that divides q's, 3, got"),
    ({"k": torch.Tensor.half}, TypeError, "k must have q's dtype, torch.float32, got float16"),
    ({"k": lambda t: t.to("meta")}, ValueError, "k must be on q's device, cpu, got .* on meta"),
    ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
    ({"block_size": 2.0}, TypeError, "block_size must be an integer, got 2.0"),
    ({"starts": torch.zeros(2, 9)}, ValueError, r"starts must be int32 \[2, 9\], got float32 \[2, 9\]"),
    ({"starts": torch.zeros(2, 8).int()}, ValueError, r"starts must be int32 \[2, 9\], got int32 \[2, 8\]"),
    (
        {"starts": torch.zeros(2, 9, device="meta").int()},
        ValueError,
        "starts must be on q's device, cpu, got .* on meta",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), CASES)
def test_message_names_argument_expectation_and_what_came(changes, error, message):
    with pytest.raises(error, match=f"block_scores: {message}"):
        ops.block_scores(**changed(changes))


def changed(changes):
    """The arguments of a good call but for some of them."""
    q, k = operands(2, 4, 2, 9, 8, torch.float32)
    arguments = {"q": q, "k": k, "block_size": 4, "starts": None}
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


# The schema refuses numbers that are no integers, and no operator serves meta tensors.
COMPILED = [(changes, message) for changes, _, message in CASES if "meta" not in message and "integer" not in message]


@pytest.mark.parametrize(("changes", "message"), COMPILED)
def test_compiled_operators_refuse_the_same(changes, message):
    with pytest.raises(RuntimeError, match="block_scores: " + message.split(" must ")[0]):
        peft_kernels.backends.kernel(OPERATOR, "cpu", torch.float32, "cpu")(*changed(changes).values())
