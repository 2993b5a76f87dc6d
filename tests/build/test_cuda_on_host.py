"""The CUDA kernels' own code, run on the CPU thread after thread by `_host`: every index, tail, stride and sum.

Between two barriers the threads run one after the other, so a race within a phase stays unseen here; shared memory is
NaN before each chunk of the rank, so reading what no thread wrote does not.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_kernels import libraries
from peft_kernels.reference.philox import dropout_mask

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.operators import formula, random_call
from ..support.places import dtype_name

if libraries.host is None:
    pytest.skip(f"no _host module: {libraries.missing['_host']}", allow_module_level=True)
host = libraries.host

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
EACH_FACTOR_DTYPE = pytest.mark.parametrize("factor_dtype", DTYPES, ids=dtype_name)


def on_host(out, hidden, factor, scaling, dropout_p, rng_state):
    """The kernel of `lora_accumulate_` with the operator's signature."""
    state = None if rng_state is None else tuple(rng_state.tolist())
    host.cuda_lora_accumulate_(out, hidden, factor, scaling, dropout_p, state)


def check(call):
    (actual,) = call.run(on_host)
    (exact,), (own,) = formula(call, torch.float64), formula(call, call.arguments["out"].dtype)
    assert_accurate(actual, own, exact, "out")


@EACH_DTYPE
@EACH_FACTOR_DTYPE
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_every_pair_of_dtypes(dtype, factor_dtype, dropout_p):
    sizes = {"rows": 35, "columns": 264, "rank": 17}
    check(random_call("lora_accumulate_", **sizes, dtype=dtype, factor_dtype=factor_dtype, dropout_p=dropout_p))


@given(
    rows=st.integers(0, 70),
    columns=st.integers(0, 530),
    rank=st.integers(0, 65),
    dtype=st.sampled_from(DTYPES),
    factor_dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    dropout_p=st.sampled_from([0.0, 2.0**-18, 0.1, 1.0]),
)
def test_any_size_layout_and_dtype(rows, columns, rank, dtype, factor_dtype, layouts, dropout_p):
    sizes = {"rows": rows, "columns": columns, "rank": rank}
    call = random_call(
        "lora_accumulate_", **sizes, dtype=dtype, factor_dtype=factor_dtype, dropout_p=dropout_p, seed=rows
    )
    names = ("out", "hidden", "factor")
    views = {name: laid_out(call.arguments[name], how) for name, how in zip(names, layouts, strict=True)}
    check(call.map(lambda tensor: tensor, **views))


@EACH_DTYPE
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 255, 256, 257, 264, 512])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 31, 32, 33])
def test_edges_of_a_tile_are_exact(dtype, rows, columns):
    # Small integers, of which every sum is exact.
    call = random_call("lora_accumulate_", rows=rows, columns=columns, rank=3, dtype=dtype, integers=True)
    (actual,) = call.run(on_host)
    assert_same_bits(actual, formula(call, torch.float64)[0].to(dtype))


@pytest.mark.parametrize("rank", [1, 15, 16, 17, 31, 32, 33, 64])
@pytest.mark.parametrize("transposed", [False, True])
def test_edges_of_a_rank_chunk_are_exact(rank, transposed):
    call = random_call("lora_accumulate_", rows=5, columns=300, rank=rank, integers=True)
    factor = laid_out(call.arguments["factor"], "transposed" if transposed else "contiguous")
    (actual,) = call.map(lambda tensor: tensor, factor=factor).run(on_host)
    assert_same_bits(actual, formula(call, torch.float64)[0].float())


@pytest.mark.parametrize("offset", range(1, 9))
@EACH_DTYPE
def test_an_unaligned_start_is_exact(dtype, offset):
    call = random_call("lora_accumulate_", rows=9, columns=272, rank=4, dtype=dtype, integers=True)
    shifted = {}
    for name in ("out", "factor"):
        tensor = call.arguments[name]
        shifted[name] = torch.zeros(tensor.shape[0], 288, dtype=tensor.dtype)[:, offset : offset + 272].copy_(tensor)
    (actual,) = call.map(lambda tensor: tensor, **shifted).run(on_host)
    assert_same_bits(actual, formula(call, torch.float64)[0].to(dtype))


@EACH_DTYPE
@pytest.mark.parametrize(("width", "first"), [(263, 2), (272, 0), (272, 8)])
@pytest.mark.parametrize("columns", [249, 259])
def test_memory_around_out_is_left_alone(dtype, width, first, columns):
    # A width of 272 starts every row on a 16-byte boundary, so that the last columns end in the middle of a vector.
    arguments = random_call("lora_accumulate_", rows=34, columns=columns, rank=5, dtype=dtype).arguments
    frame = torch.full((38, width), 7.0, dtype=dtype)
    wide_factor = torch.full((5, 272), float("nan"))
    factor = wide_factor[:, :columns].copy_(arguments["factor"])
    inside = frame[2:36, first : first + columns]
    host.cuda_lora_accumulate_(inside, arguments["hidden"], factor, 1.0, 0.0, None)
    expected = 7.0 + arguments["hidden"].double() @ factor.double()
    torch.testing.assert_close(inside.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)
    inside.fill_(7.0)
    assert (frame == 7.0).all()


def test_nothing_beyond_the_tensors_is_touched():
    # In its own process: every tensor ends where memory ends, and one element further is a segmentation fault.
    command = [sys.executable, "-m", "tests.build.memory_end"]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}{result.stderr}"


def test_dropped_elements_keep_their_bits_even_beside_nan():
    call = random_call("lora_accumulate_", rows=40, columns=264, rank=4, dropout_p=0.5)
    a = call.arguments
    a["hidden"][:] = float("nan")
    (actual,) = call.run(on_host)
    keep = dropout_mask(40, 264, 0.5, a["rng_state"])
    assert torch.equal(actual.isnan(), keep)
    assert_same_bits(actual[~keep], a["out"][~keep])


def test_lanes_read_the_factor_tile_from_different_banks():
    slots = host.cuda_factor_slots()
    assert sorted(slots) == list(range(256))
    for half in (0, 4):
        for first_lane in range(0, 32, 8):  # a 16-byte read serves 8 lanes at a time, of 32 banks of 4 bytes
            words = [slots[8 * lane + half] for lane in range(first_lane, first_lane + 8)]
            assert len({word % 32 for word in words}) == 8
            assert all(word % 4 == 0 and slots[slots.index(word) + 3] == word + 3 for word in words)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (3, 16), (5, 17), (70, 250), (300, 33), (2, 4096)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.05, 0.5, 1.0])
def test_masks_are_the_same_bits(shape, dropout_p):
    seed, offset = -9, 2**40 + 3
    actual = torch.tensor(list(host.cuda_dropout_mask(*shape, dropout_p, seed, offset)), dtype=torch.bool)
    assert torch.equal(actual.reshape(shape), dropout_mask(*shape, dropout_p, torch.tensor([seed, offset])))


def test_an_out_that_overlaps_itself_is_refused():
    hidden, factor = torch.ones(4, 2), torch.ones(2, 6)
    for out in (torch.zeros(1, 6).expand(4, 6), torch.zeros(9).as_strided((4, 6), (1, 1))):
        with pytest.raises(ValueError, match="out must not overlap itself in memory"):
            host.cuda_lora_accumulate_(out, hidden, factor, 1.0, 0.0, None)


@pytest.mark.parametrize("shape", [(1, 6), (4, 1), (1, 1)])
def test_strides_of_a_single_row_or_column_do_not_count_as_overlap(shape):
    out = torch.zeros(6).as_strided(shape, (0 if shape[0] == 1 else 1, 0 if shape[1] == 1 else 1))
    host.cuda_lora_accumulate_(out, torch.ones(shape[0], 2), torch.ones(2, shape[1]), 1.0, 0.0, None)
    assert (out == 2.0).all()
