"""`outer_product_topk` against a sort of the product: sizes, ties, excluded positions, extreme numbers, bad input."""

from __future__ import annotations

import re

import pytest
import torch

from peft_kernels.ops import outer_product_topk
from peft_kernels.reference.sparse_selection import outer_product_topk as reference

from ..support.accuracy import assert_same_bits
from ..support.places import compiled_places, dtype_name, places_and_dtypes

OPERATOR = "outer_product_topk"
DTYPES = (torch.float32, torch.float64)
EACH_PLACE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(OPERATOR, dtypes=DTYPES))
SIZES = ((1, 1), (5, 7), (1, 4099), (4099, 1), (64, 300), (31, 2050))
KINDS = {
    "uniform": torch.rand,
    "few_values": lambda n: (3 * torch.rand(n)).round(),
    "equal": torch.ones,
    "zeros": torch.zeros,
    "wide": lambda n: torch.randn(n).mul(20).exp(),  # products overflow to infinity and underflow to zero
    "negative_zeros": lambda n: torch.where(torch.rand(n) < 0.5, -torch.zeros(n), torch.rand(n)),
}


def factors(kind, n, k, dtype, device):
    return [KINDS[kind](size).to(dtype).to(device) for size in (n, k)]


def some_positions(entries, share, device):
    return torch.randperm(entries)[: int(share * entries)].sort().values.to(device)


@EACH_PLACE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_ties(place, dtype, kind, size):
    if place.simulated and max(size) > 100:
        pytest.skip("takes minutes where kernels are simulated")
    rows, columns = factors(kind, *size, dtype, place.device)
    entries = rows.numel() * columns.numel()
    for share in (0.0, 0.3, 1.0):
        exclude = some_positions(entries, share, place.device)
        left = entries - len(exclude)
        for count in {0, min(1, left), left // 50, left // 2, left}:
            expected = reference(rows, columns, count, exclude)
            for index_dtype in (torch.int32, torch.int64):
                actual = place.kernel(OPERATOR, dtype)(rows, columns, count, exclude.to(index_dtype))
                assert_same_bits(actual, expected, f"{count} of {left}")


@EACH_PLACE
def test_the_largest_may_be_excluded(place, dtype):
    rows, columns = factors("uniform", 90, 110, dtype, place.device)
    largest = outer_product_topk(rows, columns, 1000)
    following = outer_product_topk(rows, columns, 500, exclude=largest)
    together = outer_product_topk(rows, columns, 1500)
    assert torch.equal(torch.cat([largest, following]).sort().values, together)


@EACH_PLACE
def test_factors_may_be_strided(place, dtype):
    rows, columns = factors("uniform", 90, 110, dtype, place.device)
    exclude = some_positions(9900, 0.1, place.device)
    apart = [torch.stack([factor, factor * 7], 1)[:, 0] for factor in (rows, columns)]
    kernel = place.kernel(OPERATOR, dtype)
    assert torch.equal(kernel(*apart, 700, exclude), kernel(rows, columns, 700, exclude))


@EACH_PLACE
def test_threads_do_not_matter(place, dtype):
    if place.simulated:
        pytest.skip("takes minutes where kernels are simulated")
    rows, columns = factors("few_values", 500, 900, dtype, place.device)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(outer_product_topk(rows, columns, 123_457))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@EACH_PLACE
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ["rows", "columns"])
def test_numbers_that_are_no_maxima_are_refused(place, dtype, value, name):
    arguments = dict(zip(("rows", "columns"), factors("uniform", 9, 11, dtype, place.device), strict=True))
    arguments[name][4] = value
    message = rf"{name} must be finite and at least 0, got -?(nan|inf|1|1\.0) at position 4"
    with pytest.raises((ValueError, RuntimeError), match=message):
        place.kernel(OPERATOR, dtype)(*arguments.values(), 3, torch.tensor([], dtype=torch.int64, device=place.device))


BAD_CALLS = {
    "rows_of_bfloat16": ({"rows": torch.Tensor.bfloat16}, "rows must be float32 or float64, got bfloat16 [4] on cpu"),
    "rows_matrix": ({"rows": lambda t: t[None]}, "rows must be 1-D, got float32 [1, 4] on cpu"),
    "columns_of_float64": (
        {"columns": torch.Tensor.double}, "columns must have rows' dtype, float32, got float64 [5] on cpu"
    ),
    "columns_matrix": ({"columns": lambda t: t[None]}, "columns must be 1-D, got float32 [1, 5] on cpu"),
    "exclude_of_floats": (
        {"exclude": torch.Tensor.float}, "exclude must be int32 or int64, got float32 [2] on cpu"
    ),
    "exclude_matrix": ({"exclude": lambda t: t[None]}, "exclude must be 1-D, got int64 [1, 2] on cpu"),
    "exclude_strided": (
        {"exclude": lambda t: t[::2]}, "exclude must be contiguous, got int64 [2] on cpu with strides [2]"
    ),
    "exclude_too_many": (
        {"exclude": lambda t: torch.arange(21)}, "exclude must be at most N K = 20 positions, got int64 [21] on cpu"
    ),
    "count_below_zero": (
        {"count": -1}, "count must be in [0, 18], the entries that are not excluded, got -1"
    ),
    "count_too_many": ({"count": 19}, "count must be in [0, 18], the entries that are not excluded, got 19"),
}  # fmt: skip


def good_arguments(device="cpu"):
    return {
        "rows": torch.rand(4, device=device),
        "columns": torch.rand(5, device=device),
        "count": 3,
        "exclude": torch.tensor([3, 9], device=device),
    }


@pytest.mark.parametrize(("namespace", "device"), compiled_places(OPERATOR))
@pytest.mark.parametrize("case", BAD_CALLS)
def test_message_names_argument_expectation_and_what_came(namespace, device, case):
    changes, message = BAD_CALLS[case]
    arguments = good_arguments(device)
    if case == "exclude_strided":
        arguments["exclude"] = torch.arange(4, device=device)
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    message = f"{OPERATOR}: {message}".replace("on cpu", f"on {device}")
    if (namespace, device) != ("peft_kernels", "cpu"):
        message = message.replace("float32 or float64", "float32")
    with pytest.raises(RuntimeError, match=re.escape(message)):
        getattr(torch.ops, namespace).outer_product_topk(*arguments.values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rows": torch.rand(4).half()}, TypeError, "rows must be float32 or float64, got float16 [4]"),
        ({"rows": torch.rand(1, 4)}, ValueError, "rows must be 1-D, got float32 [1, 4]"),
        ({"columns": torch.rand(5).double()}, TypeError, "columns must have rows' dtype, float32, got float64 [5]"),
        ({"exclude": torch.tensor([9, 3])}, ValueError, "exclude must be sorted and unique, got 3 at position 1"),
        ({"exclude": torch.tensor([3, 20])}, ValueError, "exclude must be in [0, 20), got 20"),
        ({"count": 19}, ValueError, "count must be in [0, 18], the entries that are not excluded, got 19"),
    ],
)  # fmt: skip
def test_function_refuses_before_anything_runs(changes, error, message):
    arguments = {**good_arguments(), **changes}
    exclude = arguments.pop("exclude")
    with pytest.raises(error, match=re.escape(message)):
        outer_product_topk(*arguments.values(), exclude=exclude)


@pytest.mark.parametrize(("namespace", "device"), compiled_places(OPERATOR))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("count", [0, 13])
def test_opcheck(namespace, device, dtype, count):
    rows, columns = factors("uniform", 8, 12, dtype, device)
    operator = getattr(torch.ops, namespace).outer_product_topk.default
    torch.library.opcheck(operator, (rows, columns, count, torch.tensor([3, 90], device=device)))
