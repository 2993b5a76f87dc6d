"""What the main loop is made for beside the library's kernels: gathered rows, gradients of a slice of columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..support.accuracy import assert_accurate
from ..support.places import dtype_name
from . import build
from .conftest import PRODUCTS

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)


@pytest.fixture(scope="module")
def products() -> Any:
    """The operators of kernels/products.cu."""
    if build.compiler() is None:
        pytest.skip("no g++, which the executor needs to compile kernels for the CPU")
    build.load((PRODUCTS, build.CSRC / "cuda" / "partial_sums.cu"), "products")
    return torch.ops.peft_kernels_simt


def matrix(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@HALVES
@pytest.mark.parametrize("picked", [0, 1, 63, 64, 65, 100])
@pytest.mark.parametrize("columns", [40, 71, 128])
def test_rows_are_gathered_in_the_load(products: Any, dtype: torch.dtype, picked: int, columns: int) -> None:
    x, weight = matrix(90, columns, dtype=dtype), matrix(50, columns, dtype=dtype)
    indices = torch.randint(0, 90, (picked,))
    exact = x[indices].double() @ weight.double().t()
    assert_accurate(products.gathered_product(x, indices, weight), x[indices] @ weight.t(), exact, "out")


@EACH_DTYPE
@pytest.mark.parametrize("tokens", [1, 31, 600])
@pytest.mark.parametrize(("first", "columns"), [(0, 8), (3, 65), (40, 60)])
def test_the_gradient_of_a_slice_of_columns(
    products: Any, dtype: torch.dtype, tokens: int, first: int, columns: int
) -> None:
    dy, x = matrix(tokens, 70, dtype=dtype), matrix(tokens, 100, dtype=dtype)
    slice_of_x = x[:, first : first + columns]
    exact, own = dy.double().t() @ slice_of_x.double(), dy.float().t() @ slice_of_x.float()
    assert_accurate(products.slice_gradient(dy, x, first, columns), own, exact, "gradient")
