"""`gradient_topk` against a sort of the dense gradient: every dtype, ties, zeros, infinities, NaN, what is excluded."""

from __future__ import annotations

import re

import pytest
import torch

from peft_kernels import use_backend
from peft_kernels.ops import gradient_topk, sparse_selection
from peft_kernels.reference.lora import accumulation_dtype

from ..support.accuracy import assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.places import places_and_dtypes

EACH_PLACE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes("product_above"))
# Below what is looked at as a whole; above it, where a threshold is estimated; with several parts; of one row, column.
SIZES = ((0, 4, 5), (3, 1, 1), (17, 33, 41), (24, 301, 403), (3, 1300, 901), (2, 1, 66_001), (2, 66_001, 1))


def integers(m, n, k, dtype, device="cpu", largest=3, seed=0):
    """Operands with exact sums, so that the order of the entries is known; many of them are equal."""
    generator = torch.Generator().manual_seed(seed)
    both = (torch.randint(-largest, largest + 1, (m, c), generator=generator) for c in (n, k))
    return [tensor.to(dtype).to(device) for tensor in both]


def by_sorting(grad_out, x, count, exclude=None):
    """The definition: a stable sort of all magnitudes, so that among equal ones the smaller position is first."""
    product = (grad_out.double().t() @ x.double()).flatten()
    size = product.abs()
    if exclude is not None:
        size[exclude.long()] = -1.0
    positions = size.sort(descending=True, stable=True).indices[:count].sort().values
    return positions, product[positions].to(accumulation_dtype(x.dtype))


def check(place, grad_out, x, count, exclude=None):
    with use_backend(place.backend):
        positions, values = gradient_topk(grad_out, x, count, exclude=exclude)
    expected, numbers = by_sorting(grad_out, x, count, exclude)
    assert_same_bits(positions, expected, "positions")
    assert_same_bits(values + 0.0, numbers + 0.0, "values")  # a sum of zeros may have either sign


@EACH_PLACE
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_sizes(place, dtype, size, share):
    grad_out, x = integers(*size, dtype, place.device)
    check(place, grad_out, x, int(share * size[1] * size[2]))


@EACH_PLACE
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("excluded", ["largest", "random", "all but the wanted"])
def test_excluded_positions_are_left_out(place, dtype, index_dtype, excluded):
    grad_out, x = integers(24, 301, 403, dtype, place.device)
    count, entries = 500, 301 * 403
    if excluded == "largest":
        exclude = by_sorting(grad_out, x, 2000)[0]
    elif excluded == "random":
        exclude = torch.randperm(entries)[:6000].sort().values.to(place.device)
    else:
        exclude = torch.randperm(entries)[count:].sort().values.to(place.device)
    check(place, grad_out, x, count, exclude.to(index_dtype))


@EACH_PLACE
@pytest.mark.parametrize("value", [0.0, 1.0, -2.0])
def test_among_equal_entries_the_first_positions_win(place, dtype, value):
    grad_out = torch.full((4, 300), value, dtype=dtype, device=place.device)
    x = torch.ones(4, 4000, dtype=dtype, device=place.device)
    for count in (1, 20_000, 300 * 4000 - 1):
        positions, values = gradient_topk(grad_out, x, count)
        assert torch.equal(positions.cpu(), torch.arange(count))
        assert (values == 4 * value).all()


@EACH_PLACE
def test_few_distinct_values(place, dtype):
    grad_out, x = integers(1, 300, 400, dtype, place.device, largest=1)
    for count in (3, 10_000, 90_000):
        check(place, grad_out, x, count)


@EACH_PLACE
def test_largest_entries_in_one_row_or_column(place, dtype):
    for which in (0, 1):
        operands = integers(6, 801, 903, dtype, place.device)
        operands[which][:, 377] *= 50
        check(place, *operands, 700)
        check(place, *operands, 5000)


@EACH_PLACE
def test_infinities_come_first(place, dtype):
    grad_out, x = integers(5, 301, 403, dtype, place.device)
    grad_out[2, 7], x[2] = float("inf"), 1.0  # all of row 7
    positions, values = gradient_topk(grad_out, x, 300)
    assert torch.equal(positions.cpu(), 7 * 403 + torch.arange(300))
    assert values.isinf().all()
    positions, values = gradient_topk(grad_out, x, 1000)
    finite = grad_out.clone()
    finite[2, 7] = 1e4
    assert torch.equal(positions, by_sorting(finite, x, 1000)[0])


@EACH_PLACE
@pytest.mark.parametrize("shape", [(5, 30, 40), (5, 301, 403)])
@pytest.mark.parametrize("many", [False, True])
def test_nan_is_refused_with_its_place(place, dtype, shape, many):
    grad_out, x = integers(*shape, dtype, place.device)
    grad_out[:, 11:] = float("nan") if many else grad_out[:, 11:]
    grad_out[3, 11] = float("nan")
    with pytest.raises(ValueError, match="the gradient must have no NaN, got one at row 11, column 0"):
        gradient_topk(grad_out, x, 100)


@EACH_PLACE
def test_normal_numbers_by_their_own_values(place, dtype):
    # Sums are rounded, so the order is that of the operator's own values: nothing left out is larger.
    grad_out, x = (torch.randn(70, size).to(dtype).to(place.device) for size in (400, 500))
    positions, values = gradient_topk(grad_out, x, 3000)
    product = (grad_out.double().t() @ x.double()).flatten()
    assert (positions[1:] > positions[:-1]).all()
    error = 70 * torch.finfo(accumulation_dtype(dtype)).eps * product.abs().max()
    assert (values.double() - product[positions]).abs().max() <= error
    size = product.abs()
    size[positions] = 0.0
    assert size.max() <= values.abs().min() + error


@EACH_PLACE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_leading_dimensions(place, dtype, layout):
    grad_out, x = integers(24, 301, 403, dtype, place.device)
    expected = gradient_topk(grad_out, x, 700)
    laid = laid_out(grad_out, layout), laid_out(x, layout)
    for operands in (laid, tuple(tensor.unflatten(0, (2, 3, 4)) for tensor in laid)):
        for actual, tensor in zip(gradient_topk(*operands, 700), expected, strict=True):
            assert_same_bits(actual, tensor)


def test_one_pass_is_enough_for_a_usual_gradient(monkeypatch):
    # Rows and columns of different scales, as gradients have.
    scale = torch.logspace(-1, 1, 1024)
    grad_out = torch.randn(256, 1024) * scale[torch.randperm(1024)]
    x = torch.randn(256, 1024) * scale[torch.randperm(1024)]
    passes = []
    above = sparse_selection._Search._above
    monkeypatch.setattr(sparse_selection._Search, "_above", lambda *a: passes.append(a[1:]) or above(*a))
    for count in (1000, 5000, 50_000):
        passes.clear()
        gradient_topk(grad_out, x, count)
        ((_, _, _, capacity),) = passes
        assert capacity <= 3 * count + 8192


def test_gradients_are_not_recorded():
    grad_out, x = integers(5, 30, 40, torch.float32)
    positions, values = gradient_topk(grad_out.requires_grad_(), x.requires_grad_(), 7)
    assert not values.requires_grad
    assert not positions.requires_grad


GOOD = {"grad_out": torch.ones(6, 4), "x": torch.ones(6, 5), "count": 3, "exclude": torch.tensor([2, 7])}
BAD = {
    "integers": ({"grad_out": torch.ones(6, 4).int()}, TypeError, "grad_out must be float32, bfloat16, float16 or"),
    "other_dtype": ({"x": torch.ones(6, 5).double()}, TypeError, "x must have grad_out's dtype, float32, got float64"),
    "other_rows": ({"x": torch.ones(5, 5)}, ValueError, "with the same leading dimensions, got float32 [6, 4] and"),
    "number": ({"x": torch.tensor(1.0)}, ValueError, "grad_out and x must be [..., N] and [..., K]"),
    "negative": ({"count": -1}, ValueError, "count must be in [0, 18], the entries that are not excluded, got -1"),
    "too_many": ({"count": 19}, ValueError, "count must be in [0, 18], the entries that are not excluded, got 19"),
    "floats": ({"exclude": torch.ones(2)}, TypeError, "exclude must be int32 or int64, got float32 [2]"),
    "matrix": ({"exclude": torch.ones(1, 2).int()}, ValueError, "exclude must be 1-D and contiguous, got int32 [1, 2]"),
    "unsorted": ({"exclude": torch.tensor([7, 2])}, ValueError, "exclude must be sorted and unique, got 2 at"),
    "twice": ({"exclude": torch.tensor([2, 2])}, ValueError, "exclude must be sorted and unique, got 2 at position 1"),
    "too_large": ({"exclude": torch.tensor([2, 20])}, ValueError, "exclude must be in [0, 20), got 20"),
    "below_zero": ({"exclude": torch.tensor([-2, 2])}, ValueError, "exclude must be in [0, 20), got -2"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    arguments = {**GOOD, **changes}
    exclude = arguments.pop("exclude")
    with pytest.raises(error, match=re.escape(message)):
        gradient_topk(*arguments.values(), exclude=exclude)
