"""`ops.merge_rows` and `ops.selected_attention` against their definitions: odd sizes, nothing, all, bad input."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import ops
from peft_kernels.reference import token_tune as reference

from ..support.accuracy import assert_same_bits


def lists(batch, tokens, count, seed=0):
    """Rows of `count` tokens of each sequence, and of the others, int32."""
    order = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)).argsort(1)
    first = torch.arange(batch)[:, None] * tokens
    return [(part.sort(1).values + first).flatten().int() for part in (order[:, :count], order[:, count:])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("batch", "tokens", "count"), [(1, 1, 1), (1, 7, 0), (2, 5, 5), (3, 33, 10), (2, 0, 0)])
def test_rows_come_back_to_the_bit(batch, tokens, count, dtype):
    x = torch.randn(batch * tokens, 5, 3).to(dtype)
    rows, others = lists(batch, tokens, count)
    selected = x[rows.long()].requires_grad_()
    constant = x[others.long()].requires_grad_()
    merged = ops.merge_rows(selected, constant, rows, others)
    assert_same_bits(merged, x, "merged")
    upstream = torch.randn_like(merged)
    grad, none = torch.autograd.grad(merged, (selected, constant), upstream, allow_unused=True)
    assert none is None
    assert_same_bits(grad, upstream[rows.long()], "gradient")


def problem(batch, tokens, count, heads, groups, dtype, depth=6):
    generator = torch.Generator().manual_seed(1)
    rows, others = lists(batch, tokens, count)

    def normal(size, number):
        return torch.randn(size, number, depth, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    selected, constant = (
        tuple(normal(len(part), number) for number in (heads, groups, groups)) for part in (rows, others)
    )
    return selected, constant, rows, others


def masks(name, batch, tokens):
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if name is None:
        return None
    if name == "window":
        return causal.triu(-3)[None, None]
    starts = torch.arange(batch)[:, None, None, None] * 2  # padding on the left, whose rows see nothing
    return causal & (torch.arange(tokens) >= starts)


@pytest.mark.parametrize("mask", [None, "window", "padding"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(("batch", "tokens", "count"), [(1, 1, 1), (2, 9, 4), (3, 17, 16), (2, 8, 8), (1, 300, 77)])
def test_attention_is_that_of_the_definition(batch, tokens, count, heads, groups, mask):
    selected, constant, rows, others = problem(batch, tokens, count, heads, groups, torch.float64)
    mask = masks(mask, batch, tokens)
    if mask is not None and tokens > 8:
        mask = torch.where(mask, 0.0, -torch.inf).double() if heads == 4 else mask
    found = ops.selected_attention(selected, constant, rows, others, batch, mask, 0.3)
    expected = reference.selected_attention(*selected, *constant, rows, others, batch, mask, 0.3)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    assert not found[1].requires_grad
    upstream = torch.randn_like(found[0])
    grads = torch.autograd.grad(found[0], (*selected, *constant), upstream, allow_unused=True)
    wanted = torch.autograd.grad(expected[0], selected, upstream)
    assert grads[3:] == (None, None, None)
    for actual, grad in zip(grads[:3], wanted, strict=True):
        torch.testing.assert_close(actual, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_and_the_same_bits_twice(dtype):
    selected, constant, rows, others = problem(2, 70, 21, 4, 2, dtype, 16)
    wide = [tuple(part.detach().double().requires_grad_() for part in parts) for parts in (selected, constant)]

    def run(selected, constant):
        attended, _ = ops.selected_attention(selected, constant, rows, others, 2)
        return attended, *torch.autograd.grad(attended, selected, torch.ones_like(attended))

    results, tolerance = run(selected, constant), 8 * torch.finfo(dtype).eps
    for actual, again, expected in zip(results, run(selected, constant), run(*wide), strict=True):
        assert actual.dtype == dtype
        assert_same_bits(again, actual, "again")
        torch.testing.assert_close(
            actual.double(), expected, rtol=0, atol=tolerance * float(expected.detach().abs().max())
        )


def test_only_gradients_that_are_wanted():
    selected, constant, rows, others = problem(1, 9, 4, 2, 2, torch.float64)
    values = selected[2]
    attended, _ = ops.selected_attention(
        (selected[0].detach(), selected[1].detach(), values), constant, rows, others, 1
    )
    expected = reference.selected_attention(*selected, *constant, rows, others, 1, None, None)[0]
    assert torch.autograd.grad(attended.sum(), values)[0].allclose(torch.autograd.grad(expected.sum(), values)[0])


def test_bad_input_is_refused():
    selected, constant, rows, others = problem(2, 6, 2, 4, 2, torch.float32)
    q, k, v = selected
    for arguments, message in (
        ((selected, constant, rows.long(), others, 2), "selected_attention: rows must be int32, got int64"),
        ((selected, constant, rows, others[None], 2), "selected_attention: other_rows must be 1-D"),
        ((selected, constant, others, rows, 2), "q must have a row for each of its 8 rows, got"),
        (((q[0], k, v), constant, rows, others, 2), "q must have at least 3 dimensions"),
        (((q, k, v[:, :1]), constant, rows, others, 2), r"other_v must be like v, \[8, 1, 6\], got"),
        (((q, k.double(), v), constant, rows, others, 2), "other_k must have k's dtype"),
        (((k, q, v), (constant[1], constant[0], constant[2]), rows, others, 2), "same number of heads"),
        ((selected, constant, rows, others, 3), "batch must divide the numbers of rows, 4 and 8, got 3"),
        ((selected, constant, rows, others, 2, torch.ones(6, 6)), r"mask must be \[B or 1, heads or 1, 6, 6\], got"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ops.selected_attention(*arguments)
    with pytest.raises(ValueError, match="merge_rows: others must have a row for each of its 8 rows, got"):
        ops.merge_rows(q, q, rows, others)
    with pytest.raises(TypeError, match="merge_rows: selected must be float32, bfloat16, float16 or float64"):
        ops.merge_rows(q.int(), q.int(), rows, others)
