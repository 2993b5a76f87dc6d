"""The product with the weight at sizes that cross the blocks of our own kernel for it (csrc/cpu/gemm_amx.cpp).

Its blocks: 32 rows by 32 columns, depths of 320, groups of 8 panels, 256 rows to a part, 512 to a chunk; fewer than 64
rows go to the library. On processors without matrix tiles, and on other backends, the same tests hold all the same.
"""

from __future__ import annotations

import os

import pytest
import torch

from peft_kernels import libraries

from ..support.accuracy import assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.operators import check_call, formula, random_call, result_dtypes
from ..support.places import operators_at_places, places_and_dtypes

DTYPES = (torch.float32, torch.bfloat16)
SIZES = (
    (64, 1, 1), (64, 32, 32), (65, 33, 31), (97, 320, 40), (96, 321, 33), (70, 1000, 7), (600, 650, 300),
    (1100, 20, 530), (64, 0, 40), (530, 64, 0),
)  # fmt: skip
PRODUCTS = ("lora_matmul", "lora_linear_forward", "lora_linear_backward")
LARGE = {"rows": 300, "columns": 350, "out_columns": 300}


EACH_PRODUCT = pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(PRODUCTS, DTYPES))


def check(call, place, dtype):
    check_call(call, place.kernel(call.operator, dtype), dtype)


@EACH_PRODUCT
@pytest.mark.parametrize(("rows", "columns", "out_columns"), SIZES)
def test_sizes(operator, place, dtype, rows, columns, out_columns):
    sizes = {"rows": rows, "columns": columns, "out_columns": out_columns}
    check(random_call(operator, **sizes, dtype=dtype, device=place.device), place, dtype)


@EACH_PRODUCT
@pytest.mark.parametrize("rank", [1, 15, 16, 17, 33, 130])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
def test_ranks_and_dropout(operator, place, dtype, rank, dropout_p):
    sizes = {"rows": 131, "columns": 150, "out_columns": 141}
    check(
        random_call(operator, **sizes, rank=rank, dtype=dtype, dropout_p=dropout_p, device=place.device), place, dtype
    )


@EACH_PRODUCT
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_integers_give_exact_results(operator, place, dtype, dropout_p):
    call = random_call(operator, **LARGE, rank=5, dtype=dtype, dropout_p=dropout_p, integers=True, device=place.device)
    results = call.run(place.kernel(operator, dtype))
    for actual, exact, promised in zip(results, formula(call, torch.float64), result_dtypes(call), strict=True):
        assert_same_bits(actual, exact.to(promised))


@EACH_PRODUCT
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_exact(operator, place, dtype, layout):
    call = random_call(operator, rows=97, columns=70, out_columns=45, dtype=dtype, integers=True, device=place.device)
    for name in call.arguments.keys() & {"x", "grad_out", "matrix", "weight", "bias"}:
        strided = call.map(lambda t: t, **{name: laid_out(call.arguments[name], layout)})
        results = strided.run(place.kernel(operator, dtype))
        for actual, exact, promised in zip(results, formula(call, torch.float64), result_dtypes(call), strict=True):
            assert_same_bits(actual, exact.to(promised), f"with {layout} {name}")


@pytest.mark.parametrize(("place", "dtype"), places_and_dtypes("lora_matmul", dtypes=(torch.float32,)))
def test_numbers_of_many_magnitudes_keep_all_their_bits(place, dtype):
    call = random_call("lora_matmul", **LARGE, dtype=dtype, device=place.device)
    spread = torch.exp2(torch.randint(-30, 31, (300, 350), generator=torch.Generator().manual_seed(1)).float())
    call = call.map(lambda t: t, x=call.arguments["x"] * spread.to(place.device))
    check(call, place, dtype)
    one_hot = torch.eye(350, device=place.device)[:300]  # picks rows of the matrix, in each of its three terms
    call = call.map(lambda t: t, x=one_hot, bias=None, hidden=torch.zeros_like(call.arguments["hidden"]))
    (result,) = call.run(place.kernel("lora_matmul", dtype))
    torch.testing.assert_close(result, call.arguments["matrix"][:300], rtol=2.0**-23, atol=0.0)


# Also the NaN that CUDA makes, memory filled with ones, and a NaN that rounding could take for infinity.
NOT_FINITE = (float("inf"), -float("inf"), float("nan"), 0x7FFFFFFF, -1, 0x7FA00000)


@EACH_PRODUCT
@pytest.mark.parametrize("value", NOT_FINITE)
def test_what_is_not_finite_stays_in_its_row_and_shows(operator, place, dtype, value):
    if isinstance(value, int):
        value = torch.tensor([value], dtype=torch.int32).view(torch.float32).to(dtype).to(place.device)[0]
    call = random_call(operator, **LARGE, dtype=dtype, device=place.device)
    name = "grad_out" if operator == "lora_linear_backward" else "x"
    (clean, *_) = call.run(place.kernel(operator, dtype))
    call.arguments[name][67, 5] = value
    (result, *_) = call.run(place.kernel(operator, dtype))
    assert not result[67].isfinite().any()
    others = torch.arange(300, device=place.device) != 67
    assert_same_bits(result[others], clean[others])


def has_matrix_tiles():
    limit = os.environ.get("PEFT_KERNELS_CPU_CAPABILITY", "amx")
    return libraries.host is not None and limit == "amx" and bool(libraries.host.cpu_features().get("amx_bf16"))


@pytest.mark.skipif(not has_matrix_tiles(), reason="without matrix tiles the product is the library's")
@pytest.mark.parametrize("operator", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_own_product_gives_the_same_bits_for_any_number_of_threads(operator, dtype):
    call = random_call(operator, rows=1100, columns=350, out_columns=300, dtype=dtype, dropout_p=0.2)
    kernel = getattr(torch.ops.peft_kernels, operator).default
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(call.run(kernel))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for left, right in zip(other, results[0], strict=True):
            assert_same_bits(left, right)
