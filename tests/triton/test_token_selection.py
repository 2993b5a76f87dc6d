"""`block_scores` on Triton: sizes of blocks around those of tiles, groups of heads, documents, strides, bad input."""

from __future__ import annotations

import inspect

import pytest
import torch
from peft_kernels.triton_kernels import token_selection

from peft_kernels.reference import token_selection as reference

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import laid_out

BLOCK_SIZES = (1, 3, 7, 16, 20, 32, 48, 64, 100, 128, 130)
"""Below, at and above tiles of 64 queries and of 64 or 128 keys; those that divide them, and those that do not."""
# B, heads, key and value heads, T, D, block_size.
SIZES = [
    (1, 1, 1, 1, 1, 1), (0, 2, 1, 9, 4, 2), (2, 2, 2, 0, 4, 2), (2, 2, 1, 5, 4, 6), (2, 0, 1, 20, 4, 5),
    (1, 2, 1, 20, 0, 5), (3, 6, 2, 70, 17, 16), (1, 3, 1, 130, 130, 32), (2, 4, 4, 65, 33, 64), (1, 2, 2, 300, 8, 50),
]  # fmt: skip


def operands(sizes, dtype, device, documents=False, integers=False):
    batch, heads, key_heads, tokens, depth, _ = sizes

    def operand(count):
        shape = (batch, count, tokens, depth)
        return (torch.randint(-2, 3, shape) if integers else torch.randn(shape)).to(dtype).to(device)

    starts = torch.randint(-2, tokens + 2, (batch, tokens), dtype=torch.int32).to(device) if documents else None
    return operand(heads), operand(key_heads), starts


def check(q, k, block_size, starts):
    found = token_selection.block_scores(q, k, block_size, starts)
    assert found.dtype == torch.float32 and found.is_contiguous()
    exact = reference.block_scores(q.double(), k.double(), block_size, starts)
    assert_accurate(found, reference.block_scores(q, k, block_size, starts), exact, "block_scores")
    return found


@pytest.mark.parametrize("operator", token_selection.LAUNCHERS)
def test_launchers_have_the_operators_arguments(operator):
    schema = getattr(torch.ops.peft_kernels, operator).default._schema
    parameters = inspect.signature(token_selection.LAUNCHERS[operator]).parameters
    assert [argument.name for argument in schema.arguments] == list(parameters)


@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(place, dtype, sizes, documents):
    q, k, starts = operands(sizes, dtype, place.device, documents)
    check(q, k, sizes[-1], starts)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_blocks_of_any_size(place, dtype, block_size):
    q, k, starts = operands((1, 2, 1, 140, 8, block_size), dtype, place.device, documents=block_size % 2 == 0)
    check(q, k, block_size, starts)


@pytest.mark.parametrize("block_size", [5, 32, 96])
def test_integers_give_exact_scores(place, dtype, block_size):
    q, k, starts = operands((2, 4, 2, 150, 9, block_size), dtype, place.device, documents=True, integers=True)
    exact = reference.block_scores(q.double(), k.double(), block_size, starts).float()
    assert_same_bits(token_selection.block_scores(q, k, block_size, starts), exact)


def test_sums_over_tiles_of_queries_are_finished_in_one_order(place, dtype, launched):
    q, k, _ = operands((1, 2, 1, 200, 8, 16), dtype, place.device)
    found = check(q, k, 16, None)
    assert [name for name, _ in launched] == ["block_scores_kernel", "sum_partials_kernel"]
    assert_same_bits(token_selection.block_scores(q, k, 16, None), found)


def test_packed_documents_have_the_scores_they_have_alone(place, dtype):
    q, k, _ = operands((1, 2, 1, 160, 8, 32), dtype, place.device)
    cut = 64
    starts = torch.zeros(1, 160, dtype=torch.int32, device=place.device)
    starts[:, cut:] = cut
    found = token_selection.block_scores(q, k, 32, starts)
    alone = [token_selection.block_scores(q[:, :, part], k[:, :, part], 32, None) for part in
             (slice(0, cut), slice(cut, 160))]  # fmt: skip
    torch.testing.assert_close(found, torch.cat(alone, 1), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("layout", ["transposed", "every_other", "offset", "padded", "tokens_first"])
def test_strides(place, dtype, layout):
    q, k, starts = operands((2, 4, 2, 70, 12, 16), dtype, place.device, documents=True)
    if layout == "tokens_first":
        views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k)]
    else:
        views = [laid_out(t, layout) for t in (q, k)]
    starts_view = laid_out(starts, "offset")
    found = token_selection.block_scores(*views, 16, starts_view)
    assert_same_bits(found, token_selection.block_scores(q, k, 16, starts))


@pytest.mark.parametrize("block_size", [4, 32])
def test_a_nan_is_not_hidden_and_stays_with_whom_it_meets(place, dtype, block_size):
    q, k, _ = operands((1, 2, 2, 96, 8, block_size), dtype, place.device)
    for tensor, token in ((k, 40), (q, 50)):
        spoiled = tensor.clone()
        spoiled[0, 1, token, 3] = float("nan")
        call = (q, spoiled) if tensor is k else (spoiled, k)
        found = token_selection.block_scores(*call, block_size, None)
        expected = reference.block_scores(*call, block_size, None)
        assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().any() and not found.isnan().all()
    later = q.clone()
    later[:, :, :8] = float("inf")  # times zeros outside of the tile it would be a NaN
    assert not token_selection.block_scores(later, k.abs(), block_size, None)[:, 8 // block_size + 1 :].isnan().any()


def test_tiles_without_a_visible_key_add_nothing(place, dtype):
    q, k, _ = operands((1, 1, 1, 200, 8, 16), dtype, place.device)
    blind = torch.arange(1, 201, dtype=torch.int32, device=place.device)[None]
    assert not token_selection.block_scores(q, k, 16, blind).any()


BAD = {
    "q_matrix": ({"q": lambda t: t[0]}, "q must be [B, heads, T, D], got float32 [4, 20, 8]"),
    "q_float64": ({"q": torch.Tensor.double}, "q must be float32, bfloat16 or float16, got float64"),
    "k_of_other_tokens": ({"k": lambda t: t[:, :, 1:]}, "k must be [2, key_value_heads, 20, 8]"),
    "k_matrix": ({"k": lambda t: t[0]}, "k must be [2, key_value_heads, 20, 8]"),
    "k_of_three_heads": ({"k": lambda t: t.repeat(1, 2, 1, 1)[:, :3]}, "with key_value_heads a divisor of 4"),
    "k_without_heads": ({"k": lambda t: t[:, :0]}, "with key_value_heads a divisor of 4"),
    "k_of_other_dtype": ({"k": torch.Tensor.half}, "k must have q's dtype, float32, got float16"),
    "k_elsewhere": ({"k": lambda t: t.to("meta")}, "k must be on "),
    "block_size": ({"block_size": lambda _: 0}, "block_size must be at least 1, got 0"),
    "starts_int64": ({"starts": torch.Tensor.long}, "starts must be int32, got int64 [2, 20]"),
    "starts_of_other_tokens": ({"starts": lambda t: t[:, 1:]}, "starts must be [2, 20], got int32 [2, 19]"),
    "starts_elsewhere": ({"starts": lambda t: t.to("meta")}, "starts must be on "),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_and_launches_nothing(place, launched, change, message):
    q, k, starts = operands((2, 4, 2, 20, 8, 5), torch.float32, place.device, documents=True)
    arguments = {"q": q, "k": k, "block_size": 5, "starts": starts}
    for name, function in change.items():
        arguments[name] = function(arguments[name])
    with pytest.raises(RuntimeError) as error:
        token_selection.LAUNCHERS["block_scores"](*arguments.values())
    assert str(error.value).startswith("block_scores: ") and message in str(error.value)
    assert launched == []
