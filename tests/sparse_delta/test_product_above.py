"""`product_above`, the entries of `grad_out^T x` from a threshold on: sizes, dtypes, strides, threads, bad input."""

from __future__ import annotations

import re

import pytest
import torch

import peft_kernels  # noqa: F401
from peft_kernels.reference.lora import accumulation_dtype
from peft_kernels.reference.sparse_selection import product_above as reference

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.places import compiled_places, dtype_name, places, places_and_dtypes

OPERATOR = "product_above"
EACH_PLACE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(OPERATOR))
EACH_OWN_PLACE = pytest.mark.parametrize(
    ("place", "dtype"), [case for case in places_and_dtypes(OPERATOR) if case.values[0].backend != "reference"]
)
# (M, N, K): around vectors, tiles, chunks of M and blocks of columns.
SIZES = (
    *((m, 37, 45) for m in (0, 1, 31, 32, 33, 255, 257)), (5, 1, 1), (40, 1, 77), (40, 77, 1), (33, 64, 96),
    (520, 33, 49), (1030, 35, 1100), (9, 0, 4), (9, 4, 0), (3000, 9, 500),
)  # fmt: skip


def sizes_of(place):
    """All sizes, without the largest where that would take minutes."""
    return [(m, n, k) for m, n, k in SIZES if m * n * k < 3_000_000 or not place.simulated]


def operands(m, n, k, dtype, device="cpu", integers=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if integers:
        values = [torch.randint(-2, 3, (m, c), generator=generator) for c in (n, k)]
    else:
        values = [torch.randn(m, c, generator=generator, dtype=torch.float64) for c in (n, k)]
    return [value.to(dtype).to(device) for value in values]


def found(kernel, grad_out, x, threshold, capacity):
    """Positions and values of what is found, and how many there are."""
    positions, values, count = kernel(grad_out, x, threshold, capacity)
    assert positions.shape == values.shape == (capacity,)
    assert positions.dtype == count.dtype == torch.int64
    assert values.dtype == accumulation_dtype(x.dtype)
    assert count.shape == (1,)
    number = int(count)
    return positions[:number], values[:number], number


@EACH_PLACE
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_exact_sums_of_every_size(place, dtype, size):
    if size not in sizes_of(place):
        pytest.skip("takes minutes where kernels are simulated")
    grad_out, x = operands(*size, dtype, place.device, integers=True)
    product = (grad_out.double().t() @ x.double()).flatten()
    for threshold in (0.0, 1.0, 3.5, 20.0, float(product.abs().max()) if len(product) else 1.0, 1e9):
        expected = (product.abs() >= threshold).nonzero().flatten()
        for room in (0, 1, 100):
            kernel = place.kernel(OPERATOR, dtype)
            positions, values, number = found(kernel, grad_out, x, threshold, len(expected) + room)
            assert number == len(expected)
            assert_same_bits(positions, expected, f"positions from {threshold}")
            assert_same_bits(values + 0.0, product[expected].to(values.dtype) + 0.0, f"values from {threshold}")


@EACH_PLACE
def test_too_little_room_is_told_by_the_count(place, dtype):
    grad_out, x = operands(9, 70, 300, dtype, place.device, integers=True)
    number = int((grad_out.double().t() @ x.double()).abs().ge(2.0).sum())
    for capacity in (0, 1, number - 1):
        positions, values, count = place.kernel(OPERATOR, dtype)(grad_out, x, 2.0, capacity)
        assert int(count) == number
        assert positions.shape == values.shape == (capacity,)


@EACH_PLACE
@pytest.mark.parametrize("rows", [70, 1200])
def test_values_are_accurate(place, dtype, rows):
    grad_out, x = operands(rows, 40, 90, dtype, place.device)
    _, values, number = found(place.kernel(OPERATOR, dtype), grad_out, x, 0.0, 3600)
    assert number == 3600
    # Tensor cores cut off each addition to the sums of a long product, which PyTorch's own on them does as well.
    sums = dtype if place.backend == "cuda" else accumulation_dtype(dtype)
    own = (grad_out.to(sums).t() @ x.to(sums)).flatten()
    assert_accurate(values, own, (grad_out.double().t() @ x.double()).flatten(), "values")


@EACH_OWN_PLACE
def test_a_threshold_between_two_numbers_is_not_rounded(place, dtype):
    # 1 + 2^-30 is 1 in float32, which does not reach it.
    one = torch.ones(1, 1, dtype=dtype, device=place.device)
    kernel = place.kernel(OPERATOR, dtype)
    assert int(kernel(one, one, 1.0, 1)[2]) == 1
    assert int(kernel(one, one, 1.0 + 2.0**-30, 1)[2]) == 0
    assert int(kernel(one, one, 1.0 - 2.0**-30, 1)[2]) == 1
    assert int(kernel(one, one, float("inf"), 1)[2]) == 0


@EACH_PLACE
def test_nan_and_infinity_are_above_any_threshold(place, dtype):
    grad_out, x = operands(40, 40, 50, dtype, place.device, integers=True)
    grad_out[3, 7], x[5, 9] = float("nan"), float("inf")
    grad_out[5] = 1.0
    positions, values, _ = found(place.kernel(OPERATOR, dtype), grad_out, x, float("inf"), 2000)
    expected = torch.zeros(40, 50, dtype=torch.bool)
    expected[7] = expected[:, 9] = True
    assert torch.equal(positions.cpu(), expected.flatten().nonzero().flatten())
    # On CUDA float goes through tf32 as two terms, of which infinity's second is NaN.
    nan = (positions.cpu() // 50 == 7) | (place.backend == "cuda" and dtype == torch.float32)
    assert torch.equal(values.cpu().isnan(), nan)
    assert torch.equal(values.cpu().isinf(), ~nan)


@EACH_OWN_PLACE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_in_every_layout(place, dtype, layout):
    kernel = place.kernel(OPERATOR, dtype)
    for size in ((37, 35, 67), (300, 70, 99)):
        grad_out, x = operands(*size, dtype, place.device)
        expected = kernel(grad_out, x, 3.0, size[1] * size[2])
        for actual, tensor in zip(
            kernel(laid_out(grad_out, layout), laid_out(x, layout), 3.0, size[1] * size[2]), expected, strict=True
        ):
            assert_same_bits(actual, tensor)


@pytest.mark.parametrize("place", places(OPERATOR))
def test_expanded_rows_and_columns(place):
    row, column = torch.randint(-2, 3, (1, 30)).float(), torch.randint(-2, 3, (20, 1)).float()
    grad_out, x = row.expand(20, 30).to(place.device), column.expand(20, 40).to(place.device)
    expected = reference(grad_out.contiguous(), x.contiguous(), 1.0, 1200)
    actual = place.kernel(OPERATOR, torch.float32)(grad_out, x, 1.0, 1200)
    number = int(expected[2])
    assert int(actual[2]) == number
    for found, tensor in zip(actual[:2], expected[:2], strict=True):
        assert torch.equal(found[:number], tensor[:number])


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@EACH_OWN_PLACE
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(place, dtype, restored_threads):
    m, n, k, threshold = (200, 90, 140, 15.0) if place.simulated else (600, 330, 1100, 60.0)
    grad_out, x = operands(m, n, k, dtype, place.device)
    results = []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        results.append(found(place.kernel(OPERATOR, dtype), grad_out, x, threshold, 40_000))
        assert 1000 < results[-1][2] < 40_000
    for other in results[1:]:
        assert_same_bits(other[0], results[0][0])
        assert_same_bits(other[1], results[0][1])


@EACH_OWN_PLACE
def test_an_entry_depends_on_its_row_and_column_alone(place, dtype):
    grad_out, x = operands(600, 130, 700, dtype, place.device)
    kernel = place.kernel(OPERATOR, dtype)
    whole = kernel(grad_out, x, 0.0, 130 * 700)[1].view(130, 700)
    part = kernel(grad_out[:, 40:91], x[:, 333:], 0.0, 51 * 367)[1].view(51, 367)
    assert_same_bits(part, whole[40:91, 333:].contiguous())


BAD_CALLS = {
    "grad_out_vector": ({"grad_out": lambda t: t[0]}, "grad_out must be 2-D, got float32 [4] on cpu"),
    "grad_out_of_integers": (
        {"grad_out": torch.Tensor.int},
        "grad_out must be float32, bfloat16, float16 or float64, got int32 [6, 4] on cpu",
    ),
    "x_vector": ({"x": lambda t: t[0]}, "x must be 2-D, got float32 [5] on cpu"),
    "x_of_other_dtype": (
        {"x": torch.Tensor.bfloat16}, "x must have the activations' dtype, float32, got bfloat16 [6, 5] on cpu"
    ),
    "x_of_other_length": ({"x": lambda t: t[:5]}, "x must be [6, K], got float32 [5, 5] on cpu"),
    "threshold_below_zero": ({"threshold": -0.5}, "threshold must be at least 0, got -0.5"),
    "threshold_nan": ({"threshold": float("nan")}, "threshold must be at least 0, got nan"),
    "capacity_below_zero": ({"capacity": -1}, "capacity must be at least 0, got -1"),
}  # fmt: skip


@pytest.mark.parametrize(("namespace", "device"), compiled_places(OPERATOR))
@pytest.mark.parametrize("case", BAD_CALLS)
def test_message_names_argument_expectation_and_what_came(namespace, device, case):
    changes, message = BAD_CALLS[case]
    grad_out, x = operands(6, 4, 5, torch.float32, device)
    arguments = {"grad_out": grad_out, "x": x, "threshold": 1.0, "capacity": 20}
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    message = f"{OPERATOR}: {message}".replace("on cpu", f"on {device}")
    if (namespace, device) != ("peft_kernels", "cpu"):
        message = message.replace("float32, bfloat16, float16 or float64", "float32, bfloat16 or float16")
    with pytest.raises(RuntimeError, match=re.escape(message)):
        getattr(torch.ops, namespace).product_above(*arguments.values())


@pytest.mark.parametrize(("namespace", "device"), compiled_places(OPERATOR))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_opcheck(namespace, device, dtype):
    operator = getattr(torch.ops, namespace).product_above.default
    for m in (0, 9):
        grad_out, x = operands(m, 8, 12, dtype, device)
        torch.library.opcheck(operator, (grad_out, x.t().contiguous().t(), 1.5, 96))
