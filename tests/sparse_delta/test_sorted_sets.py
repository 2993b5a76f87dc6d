"""Set algebra on sorted positions, against Python's sets: sizes, both index dtypes, states that follow, bad input."""

from __future__ import annotations

import re

import pytest
import torch

from peft_kernels.ops import (
    sorted_contains,
    sorted_difference,
    sorted_intersection,
    sorted_merge,
    sorted_union,
)

from ..support.accuracy import assert_same_bits
from ..support.places import compiled_cases, dtype_name, places

EACH_PLACE = pytest.mark.parametrize("place", places("sorted_merge", "sorted_contains"))
INDICES = pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=dtype_name)
# Around pieces of the output, and one array much longer than the other.
SIZES = ((0, 0), (0, 5), (5, 0), (1, 1), (30, 4066), (4096, 4096), (4097, 8191), (3, 40_000), (40_000, 3), (9000, 200))


def drawn(n, m, index_dtype, device, pattern="random"):
    """Two sorted arrays without a common element."""
    if pattern == "behind":
        both = torch.arange(n + m)
    elif pattern == "before":
        both = torch.arange(n + m).roll(n)
    else:
        both = torch.randperm(2 * (n + m) + 1)[: n + m]
    return [part.sort().values.to(index_dtype).to(device) for part in (both[:n], both[n:])]


@EACH_PLACE
@INDICES
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pattern", ["random", "behind", "before"])
def test_merge(place, index_dtype, size, pattern):
    first, second = drawn(*size, index_dtype, place.device, pattern)
    merged, source = place.kernel("sorted_merge", torch.float32)(first, second)
    joined = torch.cat([first, second])
    expected = torch.tensor(sorted(joined.tolist()), dtype=index_dtype)
    assert_same_bits(merged, expected)
    assert source.dtype == torch.int64
    assert_same_bits(joined[source], expected)


@EACH_PLACE
@INDICES
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pattern", ["random", "behind", "before"])
def test_contains(place, index_dtype, size, pattern):
    first, second = drawn(*size, index_dtype, place.device, pattern)
    shared = torch.cat([first, second[::3]]).sort().values
    kernel = place.kernel("sorted_contains", torch.float32)
    for left, right in ((shared, second), (second, shared), (first, second), (first, first)):
        elements = set(right.tolist())
        expected = torch.tensor([index in elements for index in left.tolist()], dtype=torch.bool)
        assert torch.equal(kernel(left, right).cpu(), expected)


@INDICES
def test_state_follows_its_positions(index_dtype):
    first, second = drawn(700, 900, index_dtype, "cpu")
    merged, source = sorted_merge(first, second)
    state = torch.cat([first * 2, second * 2])[source]
    assert torch.equal(state, merged * 2)


@INDICES
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_algebra(index_dtype, size):
    first, second = drawn(*size, index_dtype, "cpu")
    first = torch.cat([first, second[1::2]]).sort().values
    left, right = set(first.tolist()), set(second.tolist())
    for function, expected in (
        (sorted_union, left | right),
        (sorted_difference, left - right),
        (sorted_intersection, left & right),
    ):
        assert_same_bits(function(first, second), torch.tensor(sorted(expected), dtype=index_dtype), function.__name__)


def test_positions_past_two_to_the_31st():
    first, second = torch.tensor([5, 2**40, 2**62]), torch.tensor([2**31, 2**40 + 1])
    assert sorted_union(first, second).tolist() == [5, 2**31, 2**40, 2**40 + 1, 2**62]
    assert sorted_contains(first, torch.tensor([2**40])).tolist() == [False, True, False]


@EACH_PLACE
@INDICES
def test_same_results_for_any_number_of_threads(place, index_dtype):
    first, second = drawn(60_000, 50_001, index_dtype, place.device)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        merged, source = place.kernel("sorted_merge", torch.float32)(first, second)
        results.append((merged, source, place.kernel("sorted_contains", torch.float32)(merged, second)))
    torch.set_num_threads(before)
    for other in results[1:]:
        for left, right in zip(other, results[0], strict=True):
            assert torch.equal(left, right)


ARRAYS = {"sorted_merge": ("first", "second"), "sorted_contains": ("indices", "other")}
OPERATORS = tuple((name,) for name in ARRAYS)


@pytest.mark.parametrize(("namespace", "device", "operator"), compiled_cases(OPERATORS))
def test_message_names_argument_expectation_and_what_came(namespace, device, operator):
    kernel = getattr(getattr(torch.ops, namespace), operator)
    good = torch.arange(4, device=device)
    left, right = ARRAYS[operator]
    for at, name in enumerate((left, right)):
        for bad, message in (
            (good.float(), f"{name} must be int32 or int64, got float32 [4] on {device}"),
            (good[None], f"{name} must be 1-D, got int64 [1, 4] on {device}"),
            (good[::2], f"{name} must be contiguous, got int64 [2] on {device} with strides [2]"),
        ):
            arguments = [good, good]
            arguments[at] = bad
            with pytest.raises(RuntimeError, match=re.escape(f"{operator}: {message}")):
                kernel(*arguments)
    message = f"{operator}: {right} must have the dtype of {left}, int64, got int32 [4] on {device}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        kernel(good, good.int())


@pytest.mark.parametrize(
    "function", [sorted_merge, sorted_contains, sorted_union, sorted_difference, sorted_intersection]
)
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.tensor([1.0]), TypeError, "must be int32 or int64, got float32 [1]"),
        (torch.tensor([[1]]), ValueError, "must be 1-D and contiguous, got int64 [1, 1]"),
        (torch.tensor([3, 5, 4]), ValueError, "must be sorted and unique, got 4 at position 2 after 5"),
        (torch.tensor([3, 3]), ValueError, "must be sorted and unique, got 3 at position 1 after 3"),
        (torch.tensor([3], dtype=torch.int32), TypeError, "must have the dtype of"),
    ],
)
def test_functions_refuse_what_is_not_sorted_and_unique(function, bad, error, message):
    good = torch.tensor([1, 2])
    for arguments in ((good, bad), (bad, good)):
        with pytest.raises(error, match=re.escape(message)):
            function(*arguments)


def test_merging_a_common_element_is_refused():
    with pytest.raises(ValueError, match="first and second must have no common element, got 5 in both"):
        sorted_merge(torch.tensor([1, 5]), torch.tensor([5, 9]))


@pytest.mark.parametrize(("namespace", "device", "operator"), compiled_cases(OPERATORS))
@INDICES
@pytest.mark.parametrize("size", [(0, 0), (13, 40)])
def test_opcheck(namespace, device, operator, index_dtype, size):
    kernel = getattr(getattr(torch.ops, namespace), operator).default
    torch.library.opcheck(kernel, tuple(drawn(*size, index_dtype, device)))
