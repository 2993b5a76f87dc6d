"""What the main loop is made for beside LoRA: gathered rows, sums kept at entries only, gradients of a slice."""

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
BLOCK = 64


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


def bucketed(places: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flat positions of a result with `columns` columns: in the order of their blocks, with where each block begins."""
    row, column = places // columns, places % columns
    block = row // BLOCK * -(-columns // BLOCK) + column // BLOCK
    order = torch.argsort(block, stable=True)
    return order, block, (row % BLOCK * BLOCK + column % BLOCK)[order].to(torch.int32).to(torch.uint16)


@EACH_DTYPE
@pytest.mark.parametrize("entries", [0, 1, 300])
def test_only_the_entries_of_a_gradient_are_written(products: Any, dtype: torch.dtype, entries: int) -> None:
    tokens, rows, columns = 75, 130, 100
    dy, x = matrix(tokens, rows, dtype=dtype), matrix(tokens, columns, dtype=dtype)
    places = torch.randperm(rows * columns)[:entries]
    places = places[places // columns < 2 * BLOCK]  # the last row of blocks has none and is skipped
    order, block, offsets = bucketed(places, columns)
    blocks = -(-rows // BLOCK) * -(-columns // BLOCK)
    begin = torch.zeros(blocks + 1, dtype=torch.int64)
    begin[1:] = torch.bincount(block, minlength=blocks).cumsum(0)
    values = products.entries_of_product(dy, x, begin, offsets, 0.5)
    exact = (0.5 * dy.double().t() @ x.double()).flatten()[places[order]]
    own = (0.5 * dy.float().t() @ x.float()).flatten()[places[order]]
    assert_accurate(values, own, exact, "values")


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
