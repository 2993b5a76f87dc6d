"""`sampled_product`, `(grad_out^T x)[indices]`: sizes, patterns of indices, dtypes, strides, threads, bad input."""

from __future__ import annotations

import re

import pytest
import torch

import peft_kernels  # noqa: F401
from peft_kernels.reference.sparse_delta import sampled_product as reference

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.places import ALL_DTYPES, compiled_places, dtype_name, places, places_and_dtypes, serves

OPERATOR = "sampled_product"
EACH_PLACE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(OPERATOR))
# torch's own product, which is the reference's, may sum in another order from call to call.
EACH_OWN_PLACE = pytest.mark.parametrize(
    ("place", "dtype"), [case for case in places_and_dtypes(OPERATOR) if case.values[0].backend != "reference"]
)
# (M, N, K): around a vector and a tile, odd, and large enough for several chunks of M and blocks of columns.
SIZES = (
    *((m, 37, 45) for m in (0, 1, 15, 16, 17, 33, 200)),
    (5, 1, 1),
    (40, 1, 77),
    (40, 77, 1),
    (33, 64, 96),
    (1500, 50, 70),
    (70, 9, 5000),
    (1100, 131, 1030),
)


def sizes_of(place):
    """All sizes, without the largest where that would take minutes."""
    return [(m, n, k) for m, n, k in SIZES if m * n * k < 10_000_000 or not place.simulated]


def all_entries(n, k):
    return torch.arange(n * k)


def random_entries(n, k, density=0.05, seed=1):
    count = max(1, int(density * n * k))
    return torch.randperm(n * k, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def clustered_entries(n, k):
    mask = torch.zeros(n, k, dtype=torch.bool)
    mask[n // 3 : n // 3 + 9, k // 2 : k // 2 + 21] = True
    mask[-1, -2:] = True
    return mask.flatten().nonzero().flatten()


PATTERNS = {
    "all": all_entries,
    "none": lambda n, k: torch.empty(0, dtype=torch.int64),
    "first": lambda n, k: torch.tensor([0]),
    "last": lambda n, k: torch.tensor([n * k - 1]),
    "row": lambda n, k: n // 2 * k + torch.arange(k),
    "column": lambda n, k: torch.arange(n) * k + k // 2,
    "clustered": clustered_entries,
    "random": random_entries,
    "dense": lambda n, k: random_entries(n, k, 0.3),
    "sparse": lambda n, k: random_entries(n, k, 0.004),
}


def operands(m, n, k, dtype, device="cpu", integers=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if integers:
        values = [torch.randint(-2, 3, (m, c), generator=generator) for c in (n, k)]
    else:
        values = [torch.randn(m, c, generator=generator, dtype=torch.float64) for c in (n, k)]
    return [value.to(dtype).to(device) for value in values]


def pytorch(grad_out, x, indices, dtype):
    return (grad_out.t() @ x).flatten()[indices.long()].to(dtype)


def check(place, grad_out, x, indices, dtype):
    indices = indices.to(grad_out.device)
    actual = place.kernel(OPERATOR, x.dtype)(grad_out, x, indices, dtype)
    assert actual.dtype == dtype and actual.shape == indices.shape and actual.is_contiguous()
    exact = reference(grad_out.double(), x.double(), indices, torch.float64)
    assert_accurate(actual, pytorch(grad_out, x, indices, dtype), exact, OPERATOR)
    return actual


@EACH_PLACE
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=dtype_name)
def test_exact_sums_of_every_size_and_pattern(place, dtype, pattern, index_dtype):
    for m, n, k in sizes_of(place):
        grad_out, x = operands(m, n, k, dtype, place.device, integers=True)
        indices = PATTERNS[pattern](n, k).to(place.device)
        expected = reference(grad_out.double(), x.double(), indices, torch.float64).float()
        actual = place.kernel(OPERATOR, dtype)(grad_out, x, indices.to(index_dtype), torch.float32)
        assert_same_bits(actual + 0.0, expected + 0.0, f"{m} x {n} x {k}")  # a sum of zeros may have either sign


@EACH_PLACE
@pytest.mark.parametrize("pattern", PATTERNS)
def test_accurate_for_every_size_and_pattern(place, dtype, pattern):
    for size in sizes_of(place):
        check(place, *operands(*size, dtype, place.device), PATTERNS[pattern](*size[1:]), dtype)


@EACH_PLACE
@pytest.mark.parametrize("result", ALL_DTYPES, ids=dtype_name)
def test_accurate_in_every_result_dtype(place, dtype, result):
    if not serves(place, (OPERATOR,), result):
        pytest.skip(f"{place.backend} does not take {dtype_name(result)}")
    for pattern in ("random", "all"):
        check(place, *operands(300, 43, 90, dtype, place.device), PATTERNS[pattern](43, 90), result)


@EACH_OWN_PLACE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", ["dense", "random"])
def test_same_bits_in_every_layout(place, dtype, layout, pattern):
    for m, n, k in ((37, 35, 67), (300, 70, 99)):
        grad_out, x = operands(m, n, k, dtype, place.device)
        indices = PATTERNS[pattern](n, k).to(place.device)
        kernel = place.kernel(OPERATOR, dtype)
        expected = kernel(grad_out, x, indices, torch.float32)
        assert_same_bits(kernel(laid_out(grad_out, layout), laid_out(x, layout), indices, torch.float32), expected)


@pytest.mark.parametrize("place", places(OPERATOR))
def test_expanded_rows_and_columns(place):
    row, column = torch.randn(1, 30), torch.randn(20, 1)
    grad_out, x = row.expand(20, 30).to(place.device), column.expand(20, 40).to(place.device)
    check(place, grad_out, x, random_entries(30, 40, 0.3), torch.float32)


@EACH_OWN_PLACE
def test_same_bits_for_both_index_dtypes_and_for_fewer_entries(place, dtype):
    grad_out, x = operands(700, 90, 140, dtype, place.device)
    indices = random_entries(90, 140, 0.008).to(place.device)
    kernel = place.kernel(OPERATOR, dtype)
    expected = kernel(grad_out, x, indices, torch.float32)
    assert_same_bits(kernel(grad_out, x, indices.int(), torch.float32), expected)
    assert_same_bits(kernel(grad_out, x, indices[1::3].contiguous(), torch.float32), expected[1::3])


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@EACH_OWN_PLACE
@pytest.mark.parametrize("pattern", ["random", "dense", "sparse", "all", "row", "clustered"])
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(place, dtype, pattern, restored_threads):
    m, n, k = (200, 90, 140) if place.simulated else (700, 330, 1100)
    grad_out, x = operands(m, n, k, dtype, place.device)
    indices = PATTERNS[pattern](n, k).to(place.device)
    kernel = place.kernel(OPERATOR, dtype)
    results = []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        results.append(kernel(grad_out, x, indices, dtype))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@EACH_PLACE
def test_what_is_not_finite_stays_with_its_row_and_column(place, dtype):
    grad_out, x = operands(40, 40, 50, dtype, place.device, integers=True)
    grad_out[3, 7], x[5, 9] = float("nan"), float("inf")
    grad_out[5] = 1.0
    result = place.kernel(OPERATOR, dtype)(grad_out, x, all_entries(40, 50).to(place.device), torch.float32)
    result = result.view(40, 50).cpu()
    nan, infinite = torch.zeros(40, 50, dtype=torch.bool), torch.zeros(40, 50, dtype=torch.bool)
    nan[7] = True
    infinite[:, 9] = True
    if place.backend == "cuda" and dtype == torch.float32:  # two tf32 terms, of which infinity's second is NaN
        assert torch.equal(~result.isfinite(), nan | infinite)
    else:
        assert torch.equal(result.isnan(), nan)
        assert torch.equal(result.isinf(), infinite & ~nan)


# What is changed about a good call (float32, grad_out [6, 4], x [6, 5], int64 indices [7]), and the message.
BAD_CALLS = {
    "grad_out_vector": ({"grad_out": lambda t: t[0]}, "grad_out must be 2-D, got float32 [4] on cpu"),
    "grad_out_batched": ({"grad_out": lambda t: t[None]}, "grad_out must be 2-D, got float32 [1, 6, 4] on cpu"),
    "grad_out_of_integers": (
        {"grad_out": torch.Tensor.int},
        "grad_out must be float32, bfloat16, float16 or float64, got int32 [6, 4] on cpu",
    ),
    "x_vector": ({"x": lambda t: t[0]}, "x must be 2-D, got float32 [5] on cpu"),
    "x_of_other_dtype": (
        {"x": torch.Tensor.bfloat16},
        "x must have the activations' dtype, float32, got bfloat16 [6, 5] on cpu",
    ),
    "x_of_other_length": ({"x": lambda t: t[:5]}, "x must be [6, K], got float32 [5, 5] on cpu"),
    "indices_matrix": ({"indices": lambda t: t[None]}, "indices must be 1-D, got int64 [1, 7] on cpu"),
    "indices_of_floats": (
        {"indices": torch.Tensor.float},
        "indices must be int32 or int64, got float32 [7] on cpu",
    ),
    "indices_of_short_integers": (
        {"indices": torch.Tensor.short},
        "indices must be int32 or int64, got Short [7] on cpu",
    ),
    "indices_strided": (
        {"indices": lambda t: t[::2]},
        "indices must be contiguous, got int64 [4] on cpu with stride 2",
    ),
    "indices_too_many": (
        {"indices": lambda t: torch.arange(21)},
        "indices must be at most N K = 20 positions, got int64 [21] on cpu",
    ),
    "dtype_of_integers": (
        {"dtype": torch.int32},
        "dtype must be float32, bfloat16, float16 or float64, got int32",
    ),
}


@pytest.mark.parametrize(("namespace", "device"), compiled_places(OPERATOR))
@pytest.mark.parametrize("case", BAD_CALLS)
def test_message_names_argument_expectation_and_what_came(namespace, device, case):
    changes, message = BAD_CALLS[case]
    grad_out, x = operands(6, 4, 5, torch.float32, device)
    arguments = {"grad_out": grad_out, "x": x, "indices": torch.arange(7, device=device), "dtype": torch.float32}
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    message = f"{OPERATOR}: {message}".replace("on cpu", f"on {device}")
    if (namespace, device) != ("peft_kernels", "cpu"):
        message = message.replace("float32, bfloat16, float16 or float64", "float32, bfloat16 or float16")
    with pytest.raises(RuntimeError, match=re.escape(message)):
        getattr(torch.ops, namespace).sampled_product(*arguments.values())


@pytest.mark.parametrize(("namespace", "device"), compiled_places(OPERATOR))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("pattern", ["random", "none"])
def test_opcheck(namespace, device, dtype, pattern):
    operator = getattr(torch.ops, namespace).sampled_product.default
    for m in (0, 9):
        grad_out, x = operands(m, 8, 12, dtype, device)
        indices = PATTERNS[pattern](8, 12).to(device)
        torch.library.opcheck(operator, (grad_out, x.t().contiguous().t(), indices.int(), torch.float32))
