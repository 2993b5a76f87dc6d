"""`slice_grad`, `grad_out[:, indices]^T x`: sizes around tiles and chunks, dtypes, strides, threads, bad input."""

from __future__ import annotations

import re

import pytest
import torch

import peft_kernels  # noqa: F401

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.places import ALL_DTYPES, compiled_places, dtype_name, places_and_dtypes, serves
from ..support.s2ft import random_channels

OPERATOR = "slice_grad"
EACH_PLACE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(OPERATOR))
# torch's own product, which is the reference's, may sum in another order from call to call.
EACH_OWN_PLACE = pytest.mark.parametrize(
    ("place", "dtype"), [case for case in places_and_dtypes(OPERATOR) if case.values[0].backend != "reference"]
)
# (M, A, s, B), s channels of the A or, where None, all: either operand the narrow one, around vectors and tiles, odd,
# and several chunks of M.
SIZES = (
    *((m, 37, None, 45) for m in (0, 1, 15, 17, 33, 200)),
    (5, 1, None, 1), (5, 0, None, 3), (5, 3, 0, 4), (5, 4, 2, 0),
    (40, 77, None, 1), (40, 77, 1, 130), (33, 130, None, 64), (33, 96, 96, 32),
    (330, 500, None, 15), (330, 70, 50, 400), (700, 101, 31, 49), (2300, 150, None, 51), (4200, 60, 7, 53),
)  # fmt: skip


def operands(m, a, s, b, dtype, device, integers=False):
    generator = torch.Generator().manual_seed(m + a + b)
    if integers:
        grad_out, x = (torch.randint(-2, 3, (m, n), generator=generator).to(dtype) for n in (a, b))
    else:
        grad_out, x = (torch.randn(m, n, generator=generator, dtype=torch.float64).to(dtype) for n in (a, b))
    indices = None if s is None else random_channels(a, s, generator).to(device)
    return grad_out.to(device), x.to(device), indices


def dense(grad_out, x, indices, dtype):
    """The slice of the dense gradient, as PyTorch has it."""
    product = grad_out.t() @ x
    return (product if indices is None else product[indices]).to(dtype)


@EACH_PLACE
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_exact_sums_of_every_size(place, dtype, size):
    grad_out, x, indices = operands(*size, dtype, place.device, integers=True)
    actual = place.kernel(OPERATOR, dtype)(grad_out, x, indices, torch.float32)
    assert actual.dtype == torch.float32 and actual.is_contiguous()
    expected = dense(grad_out.double(), x.double(), indices, torch.float32)
    assert_same_bits(actual + 0.0, expected + 0.0)  # a sum of zeros may have either sign


@EACH_PLACE
@pytest.mark.parametrize("result", ALL_DTYPES, ids=dtype_name)
def test_accurate_in_every_result_dtype(place, dtype, result):
    if not serves(place, (OPERATOR,), result):
        pytest.skip(f"{place.backend} does not take {dtype_name(result)}")
    for size in ((300, 130, None, 43), (300, 130, 61, 90), (2300, 80, None, 90), (40, 77, 1, 130)):
        call = operands(*size, dtype, place.device)
        actual = place.kernel(OPERATOR, dtype)(*call, result)
        assert actual.dtype == result
        exact = dense(call[0].double(), call[1].double(), call[2], torch.float64)
        assert_accurate(actual, dense(*call, result), exact, str(size))


@EACH_OWN_PLACE
def test_a_float32_result_of_half_precision_is_not_rounded_to_it(place, dtype):
    call = operands(300, 130, None, 60, dtype, place.device)
    actual = place.kernel(OPERATOR, dtype)(*call, torch.float32)
    exact = dense(call[0].double(), call[1].double(), None, torch.float64)
    own = dense(call[0].float(), call[1].float(), None, torch.float32)
    assert_accurate(actual, own, exact, "sums in float32")


@pytest.mark.parametrize(
    ("place", "dtype"), places_and_dtypes(OPERATOR, dtypes=(torch.float32, torch.bfloat16, torch.float64))
)
@pytest.mark.parametrize("columns", [9, 70])
def test_accuracy_does_not_fall_with_the_number_of_rows(place, dtype, columns):
    if place.simulated:
        pytest.skip("takes minutes")
    call = operands(40_000, 81, None, columns, dtype, place.device)
    wide = torch.promote_types(dtype, torch.float32)
    actual = place.kernel(OPERATOR, dtype)(*call, wide)
    own = dense(call[0].to(wide), call[1].to(wide), None, wide)
    assert_accurate(actual, own, dense(call[0].double(), call[1].double(), None, torch.float64), "sums of 40000 rows")


@EACH_OWN_PLACE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(37, 135, None, 60), (300, 35, 11, 67), (70, 90, None, 5)], ids=str)
def test_same_bits_in_every_layout(place, dtype, layout, size):
    grad_out, x, indices = operands(*size, dtype, place.device)
    kernel = place.kernel(OPERATOR, dtype)
    expected = kernel(grad_out, x, indices, torch.float32)
    actual = kernel(laid_out(grad_out, layout), laid_out(x, layout), indices, torch.float32)
    assert_same_bits(actual, expected)


@EACH_PLACE
def test_expanded_operands(place, dtype):
    # `y.sum().backward()` hands back one number with strides of zero.
    one, x = torch.ones((), dtype=dtype, device=place.device), torch.ones(20, 40, dtype=dtype, device=place.device)
    actual = place.kernel(OPERATOR, dtype)(one.expand(20, 130), x, None, torch.float32)
    assert_same_bits(actual, torch.full((130, 40), 20.0, device=place.device))


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@EACH_OWN_PLACE
@pytest.mark.parametrize("size", [(700, 900, None, 60), (700, 300, 17, 900), (2500, 700, None, 33)], ids=str)
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(place, dtype, size, restored_threads):
    call = operands(*size, dtype, place.device)
    kernel = place.kernel(OPERATOR, dtype)
    results = []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        results.append(kernel(*call, dtype))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@EACH_PLACE
@pytest.mark.parametrize("columns", [20, 60])
def test_what_is_not_finite_stays_with_its_row_and_column(place, dtype, columns):
    grad_out, x, _ = operands(40, 70, None, columns, dtype, place.device, integers=True)
    grad_out[3, 7], x[5, 9] = float("nan"), float("inf")
    grad_out[5] = 1.0
    result = place.kernel(OPERATOR, dtype)(grad_out, x, None, torch.float32).cpu()
    expected = torch.ones(70, columns, dtype=torch.bool)
    expected[7] = False
    expected[:, 9] = False
    assert torch.equal(result.isfinite(), expected)
    assert result[7].isnan().all()


# What is changed about a good call (float32, grad_out [6, 4], x [6, 5], int64 indices [2]), and the message.
BAD_CALLS = {
    "grad_out_vector": ({"grad_out": lambda t: t[0]}, "grad_out must be 2-D, got float32 [4] on cpu"),
    "grad_out_of_integers": ({"grad_out": torch.Tensor.int}, "grad_out must be float32, "),
    "x_vector": ({"x": lambda t: t[0]}, "x must be 2-D, got float32 [5] on cpu"),
    "x_of_other_dtype": (
        {"x": torch.Tensor.bfloat16},
        "x must have the activations' dtype, float32, got bfloat16 [6, 5] on cpu",
    ),
    "x_of_other_length": ({"x": lambda t: t[:5]}, "x must be [6, B], got float32 [5, 5] on cpu"),
    "indices_matrix": ({"indices": lambda t: t[None]}, "indices must be 1-D, got int64 [1, 2] on cpu"),
    "indices_of_int32": ({"indices": torch.Tensor.int}, "indices must be int64, got int32 [2] on cpu"),
    "indices_strided": (
        {"indices": lambda t: torch.arange(4)[::2]},
        "indices must be contiguous, got int64 [2] on cpu with strides [2]",
    ),
    "indices_too_many": (
        {"indices": lambda t: torch.arange(5)},
        "indices must be at most as many as there are channels, 4, got int64 [5] on cpu",
    ),
    "dtype_of_integers": ({"dtype": torch.int32}, "dtype must be float32, "),
}


@pytest.mark.parametrize(("namespace", "device"), compiled_places(OPERATOR))
@pytest.mark.parametrize("case", BAD_CALLS)
def test_message_names_argument_expectation_and_what_came(namespace, device, case):
    changes, message = BAD_CALLS[case]
    grad_out, x, indices = operands(6, 4, 2, 5, torch.float32, device)
    arguments = {"grad_out": grad_out, "x": x, "indices": indices, "dtype": torch.float32}
    for name, change in changes.items():
        changed = change(arguments[name]) if callable(change) else change
        arguments[name] = changed.to(device) if isinstance(changed, torch.Tensor) else changed
    message = f"{OPERATOR}: {message}".replace("on cpu", f"on {arguments['x'].device}")
    with pytest.raises(RuntimeError, match=re.escape(message)):
        getattr(torch.ops, namespace).slice_grad(*arguments.values())
