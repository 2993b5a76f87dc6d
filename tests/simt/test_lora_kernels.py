"""The CUDA kernels of the LoRA family in the executor: what is theirs alone.

What every backend must do is in tests/lora, which runs on them as well (`make simulated`). Every launch here is also
watched for races, accesses outside of its tensors, copies that were not waited for and barriers that threads miss.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_kernels.reference.philox import dropout_mask

from ..support.accuracy import assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.operators import DROPPING, OPERATORS, check_call, formula, random_call
from ..support.places import dtype_name
from . import build
from .operators import NAMESPACE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
EACH_OPERATOR = pytest.mark.parametrize("operator", OPERATORS)


@pytest.fixture(scope="module", autouse=True)
def library():
    if build.compiler() is None:
        pytest.skip("no g++, which the executor needs to compile kernels for the CPU")
    build.load()


def kernel(operator):
    return getattr(getattr(torch.ops, NAMESPACE), operator).default


def assert_exact(call):
    """For calls on small integers, of which every sum is exact."""
    for actual, expected in zip(call.run(kernel(call.operator)), formula(call, torch.float64), strict=True):
        assert torch.equal(actual, expected.to(actual.dtype))  # zeros of either sign


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name in DROPPING])
@EACH_DTYPE
def test_any_order_of_blocks_warps_and_lanes_gives_the_same_bits(operator, dtype):
    call = random_call(operator, rows=150, columns=300, out_columns=140, rank=17, dtype=dtype, dropout_p=0.2)
    build.set_seed(0)
    first = call.run(kernel(operator))
    for seed in (1, 2, 3):
        build.set_seed(seed)
        for again, before in zip(call.run(kernel(operator)), first, strict=True):
            assert_same_bits(again, before)


@EACH_OPERATOR
@EACH_DTYPE
@pytest.mark.parametrize("rank", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130])
def test_edges_of_a_tile_of_the_rank_are_exact(operator, dtype, rank):
    assert_exact(random_call(operator, rows=9, columns=40, out_columns=24, rank=rank, dtype=dtype, integers=True))


@EACH_OPERATOR
@EACH_DTYPE
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_edges_of_a_tile_of_rows_are_exact(operator, dtype, rows):
    assert_exact(random_call(operator, rows=rows, columns=24, out_columns=40, rank=3, dtype=dtype, integers=True))


@EACH_OPERATOR
@EACH_DTYPE
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 255, 257])
def test_edges_of_a_tile_of_columns_are_exact(operator, dtype, columns):
    sizes = {"columns": columns, "out_columns": columns + 1}
    assert_exact(random_call(operator, rows=5, rank=3, **sizes, dtype=dtype, integers=True))


@EACH_OPERATOR
@EACH_DTYPE
@pytest.mark.parametrize("offset", range(1, 9))
def test_unaligned_starts_are_exact(operator, dtype, offset):
    call = random_call(operator, rows=9, columns=72, out_columns=80, rank=4, dtype=dtype, integers=True)

    def shifted(tensor):
        wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 16, dtype=tensor.dtype)
        return wide[..., offset : offset + tensor.shape[-1]].copy_(tensor)

    assert_exact(call.map(shifted))


@given(
    operator=st.sampled_from(OPERATORS),
    rows=st.integers(0, 150),
    columns=st.integers(0, 150),
    out_columns=st.integers(0, 150),
    rank=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    factor_dtype=st.sampled_from(DTYPES),
    dropout_p=st.sampled_from([0.0, 0.0, 2.0**-18, 0.1, 1.0]),
    data=st.data(),
)
def test_any_size_layout_and_dtype(operator, rows, columns, out_columns, rank, dtype, factor_dtype, dropout_p, data):
    p = dropout_p if operator in DROPPING else 0.0
    sizes = {"rows": rows, "columns": columns, "out_columns": out_columns, "rank": rank}
    call = random_call(operator, **sizes, dtype=dtype, factor_dtype=factor_dtype, dropout_p=p, seed=rows)
    check_call(call.map(lambda tensor: laid_out(tensor, data.draw(st.sampled_from(LAYOUTS)))), kernel(operator), dtype)


# Twelve by eight blocks of 128 x 128 are the fewest for which lora_matmul takes its large block.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_the_large_block_of_the_product(dtype, layout, dropout_p):
    call = random_call(
        "lora_matmul", rows=1411, columns=200, out_columns=1020, rank=33, dtype=dtype, dropout_p=dropout_p
    )
    check_call(call.map(lambda t: t, matrix=laid_out(call.arguments["matrix"], layout)), kernel("lora_matmul"), dtype)


@pytest.mark.parametrize("operator", ["lora_shrink", "lora_factor_grad"])
@EACH_DTYPE
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_sums_that_are_split_over_blocks(operator, dtype, dropout_p):
    long = {"columns": 2100, "rows": 6} if operator == "lora_shrink" else {"columns": 6, "rows": 2100}
    check_call(random_call(operator, **long, rank=5, dtype=dtype, dropout_p=dropout_p), kernel(operator), dtype)


@EACH_DTYPE
def test_dropped_elements_keep_their_bits_even_beside_nan(dtype):
    call = random_call("lora_accumulate_", rows=40, columns=264, rank=4, dtype=dtype, dropout_p=0.5)
    arguments = call.arguments
    arguments["hidden"][:] = float("nan")
    (actual,) = call.run(kernel("lora_accumulate_"))
    keep = dropout_mask(40, 264, 0.5, arguments["rng_state"])
    assert torch.equal(actual.isnan(), keep)
    assert_same_bits(actual[~keep], arguments["out"][~keep])


@pytest.mark.parametrize("operator", ["lora_shrink", "lora_factor_grad"])
@EACH_DTYPE
def test_what_is_dropped_does_not_enter_even_as_nan(operator, dtype):
    call = random_call(operator, rows=70, columns=90, rank=4, dtype=dtype, dropout_p=0.5)
    keep = dropout_mask(70, 90, 0.5, call.arguments["rng_state"])
    poisoned = torch.where(keep, call.arguments["x"], torch.tensor(float("nan"), dtype=dtype))
    expected = call.run(kernel(operator))
    for actual, same in zip(call.map(lambda t: t, x=poisoned).run(kernel(operator)), expected, strict=True):
        assert_same_bits(actual, same)
