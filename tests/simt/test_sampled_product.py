"""`sampled_product` in the executor: its two ways, on either side of the rule that chooses, and at the edges of each.

What every backend must do is in tests/sparse_delta, which runs on these kernels as well (`make simulated`).
"""

from __future__ import annotations

import pytest
import torch

from peft_kernels.reference.sparse_delta import sampled_product as reference

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.places import dtype_name
from . import build

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
HALVES = pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
DENSITIES = pytest.mark.parametrize("density", [0.005, 0.2], ids=["dots", "tiles"])
ONE_IN = {torch.float32: 33, torch.bfloat16: 110, torch.float16: 110}
"""The density from which tiles are taken, as in csrc/cuda/sampled_product.cu."""


@pytest.fixture(scope="module")
def simulated():
    if build.compiler() is None:
        pytest.skip("no g++, which the executor needs to compile kernels for the CPU")
    build.load()
    return torch.ops.peft_kernels_simt.sampled_product


def matrices(m, n, k, dtype, integers=False):
    if integers:
        return tuple(torch.randint(-2, 3, (m, columns)).to(dtype) for columns in (n, k))
    return tuple(torch.randn(m, columns, dtype=torch.float64).to(dtype) for columns in (n, k))


def positions(n, k, count):
    return torch.randperm(n * k)[:count].sort().values


def assert_exact(simulated, dy, x, indices):
    """For matrices of small integers, of which every sum is exact."""
    expected = reference(dy.double(), x.double(), indices, torch.float64).float()
    assert_same_bits(simulated(dy, x, indices, torch.float32) + 0.0, expected + 0.0)


@EACH_DTYPE
@DENSITIES
@pytest.mark.parametrize("result", DTYPES, ids=dtype_name)
def test_any_order_of_blocks_warps_and_lanes_gives_the_same_bits(simulated, dtype, density, result):
    m, n, k = 1100, 70, 150  # two slabs of tokens for dot products, splits of them for tiles
    dy, x = matrices(m, n, k, dtype)
    indices = positions(n, k, int(n * k * density))
    first = simulated(dy, x, indices, result)
    exact = reference(dy.double(), x.double(), indices, torch.float64)
    assert_accurate(first, reference(dy, x, indices, result), exact, "values")
    for seed in (1, 2):
        build.set_seed(seed)
        assert_same_bits(simulated(dy, x, indices, result), first)


@EACH_DTYPE
def test_both_sides_of_the_rule(simulated, dtype):
    m, n, k = 65, 66, 190
    dy, x = matrices(m, n, k, dtype, integers=True)
    fewest = n * k // ONE_IN[dtype]
    for count in (fewest - 1, fewest, fewest + 1):
        assert_exact(simulated, dy, x, positions(n, k, count))


@EACH_DTYPE
@DENSITIES
@pytest.mark.parametrize("m", [1, 63, 64, 65, 1023, 1024, 1025, 2049])
def test_edges_of_slabs_and_steps_of_tokens_are_exact(simulated, dtype, density, m):
    dy, x = matrices(m, 17, 90, dtype, integers=True)
    assert_exact(simulated, dy, x, positions(17, 90, int(17 * 90 * density)))


@EACH_DTYPE
@DENSITIES
@pytest.mark.parametrize("columns", [63, 64, 65, 128, 129])
def test_edges_of_tiles_are_exact(simulated, dtype, density, columns):
    for n, k in ((columns, 40), (40, columns)):
        dy, x = matrices(20, n, k, dtype, integers=True)
        assert_exact(simulated, dy, x, positions(n, k, int(n * k * density)))


@EACH_DTYPE
@DENSITIES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_exact(simulated, dtype, density, layout):
    dy, x = matrices(70, 24, 72, dtype, integers=True)
    indices = positions(24, 72, int(24 * 72 * density))
    assert_exact(simulated, laid_out(dy, layout), x, indices)
    assert_exact(simulated, dy, laid_out(x, layout), indices)


# Eleven by ten tiles of 128 x 128; 96 are the fewest for which they are taken. Most have no entry.
@HALVES
def test_the_large_tile(simulated, dtype):
    n, k = 1290, 1160
    dy, x = matrices(67, n, k, dtype, integers=True)
    wanted = torch.zeros(n, k, dtype=torch.bool)
    wanted[120:140, 250:700] = True
    wanted[-3:] = True
    wanted[:, -1] = True
    wanted[0, 0] = True
    indices = wanted.flatten().nonzero().flatten()
    assert len(indices) >= n * k // 110
    assert_exact(simulated, dy, x, indices)


@EACH_DTYPE
def test_rows_with_all_or_none_of_their_entries(simulated, dtype):
    dy, x = matrices(30, 140, 200, dtype, integers=True)
    wanted = torch.zeros(140, 200, dtype=torch.bool)
    wanted[1::7] = True
    assert_exact(simulated, dy, x, wanted.flatten().nonzero().flatten().int())
