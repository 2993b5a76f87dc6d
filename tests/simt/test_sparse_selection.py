"""Selection of entries in the executor: large tiles, lists without room, every seed, rows and columns of any number.

What every backend must do is in tests/sparse_delta, which runs on these kernels as well (`make simulated`).
"""

from __future__ import annotations

import pytest
import torch

from peft_kernels.reference import sparse_selection as reference

from ..support.accuracy import assert_same_bits
from ..support.places import dtype_name
from . import build

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
INDICES = pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=dtype_name)


@pytest.fixture(scope="module")
def operators():
    if build.compiler() is None:
        pytest.skip("no g++, which the executor needs to compile kernels for the CPU")
    build.load()
    return torch.ops.peft_kernels_simt


def assert_found(operators, dy, x, threshold, room):
    """For matrices of small integers, of which every sum is exact; returns how many entries there are."""
    number = int(reference.product_above(dy.double(), x.double(), threshold, 0)[2])
    capacity = max(0, number + room)
    positions, values, count = operators.product_above(dy, x, threshold, capacity)
    assert int(count) == number
    if room >= 0:
        expected = reference.product_above(dy.double(), x.double(), threshold, capacity)
        assert_same_bits(positions[:number], expected[0][:number], "positions")
        assert_same_bits(values[:number] + 0.0, expected[1][:number].float() + 0.0, "values")
    return number


def integers(m, n, k, dtype):
    return torch.randint(-2, 3, (m, n)).to(dtype), torch.randint(-2, 3, (m, k)).to(dtype)


@EACH_DTYPE
@pytest.mark.parametrize("room", [0, 5, -3])
def test_any_order_of_blocks_finds_the_same_in_order(operators, dtype, room):
    dy, x = integers(65, 130, 200, dtype)  # three by four tiles of 64 x 64
    for seed in (0, 1, 2):
        build.set_seed(seed)
        assert assert_found(operators, dy, x, 14.0, room) > 4000


@EACH_DTYPE
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 129])
def test_edges_of_tiles(operators, dtype, columns):
    for n, k in ((columns, 40), (40, columns)):
        for threshold in (0.0, 5.0):
            assert_found(operators, *integers(20, n, k, dtype), threshold, 0)


# Eleven by ten tiles of 128 x 128; 96 are the fewest for which they are taken.
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
def test_the_large_tile(operators, dtype):
    assert assert_found(operators, *integers(20, 1290, 1160, dtype), 18.0, 0) > 1000


@pytest.mark.parametrize("size", [(1, 1), (70, 33), (300, 3), (3, 300), (2, 4099)], ids=str)
@pytest.mark.parametrize("kind", ["random", "ties", "zeros"])
@INDICES
def test_the_largest_products(operators, size, kind, index_dtype):
    factors = [torch.rand(number) for number in size]
    if kind == "ties":
        factors = [(3 * factor).round() for factor in factors]
    if kind == "zeros":
        factors[0] = -torch.zeros(size[0])
    entries = size[0] * size[1]
    for excluded in (0, entries // 3):
        exclude = torch.randperm(entries)[:excluded].sort().values.to(index_dtype)
        for count in (1, (entries - excluded + 1) // 2, entries - excluded):
            expected = reference.outer_product_topk(*factors, count, exclude)
            assert_same_bits(operators.outer_product_topk(*factors, count, exclude), expected, f"{count} of {entries}")


@INDICES
def test_a_merge_writes_every_place_even_of_arrays_that_share_elements(operators, index_dtype):
    first, second = torch.arange(0, 900, 2).to(index_dtype), torch.arange(0, 900, 3).to(index_dtype)
    merged, source = operators.sorted_merge(first, second)
    assert_same_bits(merged, torch.cat([first, second]).sort().values)
    assert torch.equal(source.sort().values, torch.arange(len(source)))
