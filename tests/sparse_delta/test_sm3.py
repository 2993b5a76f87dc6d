"""`sparse_sm3_` against SM3 in other words: the cover of rows and columns in loops, and fifty steps of it."""

from __future__ import annotations

import math

import pytest
import torch

from peft_kernels.reference.sparse_delta import sparse_sm3_ as reference

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.places import dtype_name, places_and_dtypes
from ..support.sparse_delta import SM3, random_delta

OPERATOR = "sparse_sm3_"
EACH_PLACE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(OPERATOR))
# In half precision fifty steps are a matter of the state's rounding.
EXACT_PLACE = pytest.mark.parametrize(
    ("place", "dtype"), places_and_dtypes(OPERATOR, dtypes=(torch.float32, torch.float64))
)
INDICES = pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=dtype_name)


def in_loops(values, grad, row_max, column_max, indices, average, lr, beta, eps, weight_decay):
    """One step in Python's numbers; `average` may be None. Returns what has changed."""
    rows, columns = list(row_max), list(column_max)
    values, average = list(values), None if average is None else list(average)
    for i, position in enumerate(indices):
        n, k = divmod(position, len(column_max))
        u = min(row_max[n], column_max[k]) + grad[i] ** 2
        rows[n], columns[k] = max(rows[n], u), max(columns[k], u)
        step = 0.0 if u == 0.0 else grad[i] / (math.sqrt(u) + eps)
        if average is not None:
            average[i] = step = beta * average[i] + (1 - beta) * step
        values[i] = values[i] * (1 - lr * weight_decay) - lr * step
    return values, rows, columns, average


@EXACT_PLACE
@INDICES
@pytest.mark.parametrize("averaged", [True, False])
def test_fifty_steps_are_those_of_the_loops(place, dtype, index_dtype, averaged):
    delta = random_delta((13, 17), 60, dtype=dtype, values_dtype=dtype, index_dtype=index_dtype, device=place.device)
    kernel, positions = place.kernel(OPERATOR, dtype), delta.indices.tolist()
    values = torch.zeros_like(delta.values)
    rows, columns = torch.zeros_like(delta.row_max), torch.zeros_like(delta.column_max)
    average = torch.zeros_like(delta.values) if averaged else None
    state = [t.tolist() for t in (values, rows, columns)] + [average.tolist() if averaged else None]
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        grad = torch.randn(60, generator=generator, dtype=torch.float64).to(dtype)
        grad[::7] = 0.0
        kernel(values, grad.to(place.device), rows, columns, average, None, delta.indices, None, *SM3.values())
        state = in_loops(state[0], grad.tolist(), state[1], state[2], positions, state[3], *SM3.values())
    for actual, expected in zip((values, rows, columns, average), state, strict=True):
        if actual is None:
            continue
        exact = torch.tensor(expected, dtype=torch.float64)
        assert (actual.cpu().double() - exact).abs().max() <= 32 * torch.finfo(dtype).eps * exact.abs().max()


@EACH_PLACE
@INDICES
@pytest.mark.parametrize("count", [0, 1, 37, 900, 6006])
def test_maxima_have_the_bits_of_the_definition(place, dtype, index_dtype, count):
    dtypes = {"dtype": dtype, "values_dtype": dtype, "index_dtype": index_dtype}
    delta = random_delta((66, 91), count, device=place.device, **dtypes)
    expected = delta.run(reference, OPERATOR)
    actual = delta.run(place.kernel(OPERATOR, dtype), OPERATOR)
    for name in ("row_max", "column_max"):
        assert_same_bits(actual[name], expected[name], name)


@EACH_PLACE
@pytest.mark.parametrize("numbers", [{"beta": 0.0}, {"eps": 0.0}, {"weight_decay": 0.0}, {"lr": 0.0}], ids=str)
def test_other_numbers_and_forms(place, dtype, numbers):
    delta = random_delta((20, 24), 77, dtype=dtype, device=place.device)
    for missing in ({}, {"exp_avg": None}, {"weight": None, "original": None}):
        changes = {**numbers, **missing}
        actual = delta.run(place.kernel(OPERATOR, dtype), OPERATOR, **changes)
        own = delta.run(reference, OPERATOR, **changes)
        exact = delta.map(torch.Tensor.double).run(reference, OPERATOR, **changes)
        assert actual.keys() == own.keys()
        for name, result in actual.items():
            assert_accurate(result, own[name], exact[name], name)


@EACH_PLACE
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_no_gradient_ever_makes_no_step(place, dtype, eps):
    delta = random_delta(dtype=dtype, values_dtype=dtype, device=place.device)
    delta = delta.map(torch.clone)
    zero = torch.zeros_like(delta.grad)
    maxima = {"row_max": torch.zeros_like(delta.row_max), "column_max": -torch.zeros_like(delta.column_max)}
    changes = {"grad": zero, "exp_avg": None, "eps": eps, "weight_decay": 0.0, **maxima}
    results = delta.run(place.kernel(OPERATOR, dtype), OPERATOR, **changes)
    assert_same_bits(results["values"], delta.values)
    assert not results["row_max"].any()
    assert not results["column_max"].any()


@EACH_PLACE
def test_a_negative_zero_is_raised_like_a_positive_one(place, dtype):
    delta = random_delta(dtype=dtype, values_dtype=dtype, device=place.device)
    results = []
    for zero in (0.0, -0.0):
        maxima = {name: torch.full_like(getattr(delta, name), zero) for name in ("row_max", "column_max")}
        kernel = place.kernel(OPERATOR, dtype)
        arguments = {**delta.copy().arguments(OPERATOR), **maxima}
        kernel(*arguments.values())
        results.append([arguments[name] + 0.0 for name in ("values", "row_max", "column_max", "weight")])
    for left, right in zip(*results, strict=True):
        assert_same_bits(left, right)


@EACH_PLACE
def test_a_nan_stays_with_its_row_and_column(place, dtype):
    delta = random_delta((20, 24), 200, dtype=dtype, values_dtype=dtype, device=place.device)
    delta.grad[50] = float("nan")
    n, k = divmod(int(delta.indices[50]), 24)
    results = delta.run(place.kernel(OPERATOR, dtype), OPERATOR)
    assert results["row_max"].isnan().nonzero().flatten().tolist() == [n]
    assert results["column_max"].isnan().nonzero().flatten().tolist() == [k]
    assert results["values"].isnan().nonzero().flatten().tolist() == [50]
    # At the next step every entry of the row and of the column is covered by it.
    delta.row_max.copy_(results["row_max"])
    delta.column_max.copy_(results["column_max"])
    delta.grad[50] = 1.0
    spread = delta.run(place.kernel(OPERATOR, dtype), OPERATOR)["values"].isnan()
    rows, columns = delta.indices // 24, delta.indices % 24
    assert torch.equal(spread, (rows == n) | (columns == k))
