"""The CUDA kernels of the LoRA family on a GPU: results, strides, streams, graphs, determinism, errors.

What every backend must do is in tests/lora, which runs on the GPU as well; here is what only CUDA kernels can get
wrong. Shapes are small, so that the file also runs under compute-sanitizer.
"""

from __future__ import annotations

import os

import pytest
import torch

from peft_kernels import libraries
from peft_kernels.reference import philox

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.operators import formula, random_call
from ..support.places import dtype_name

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if libraries.missing["_C_cuda"] is not None:
    pytest.skip(libraries.missing["_C_cuda"], allow_module_level=True)

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
# A wait for the GPU, long beside a launch and short beside a test.
SLEEP_CYCLES = 200_000_000

accumulate_ = torch.ops.peft_kernels.lora_accumulate_.default
dropout_mask = torch.ops.peft_kernels.dropout_mask.default


def call(**options):
    return random_call("lora_accumulate_", device="cuda", **options)


def check(call):
    (actual,) = call.run(accumulate_)
    (exact,), (own,) = formula(call, torch.float64), formula(call, call.arguments["out"].dtype)
    assert_accurate(actual, own, exact, "out")


def check_exact(call):
    """For calls on small integers, of which every sum is exact."""
    (actual,) = call.run(accumulate_)
    assert_same_bits(actual, formula(call, torch.float64)[0].to(actual.dtype))


@EACH_DTYPE
@pytest.mark.parametrize("factor_dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_every_pair_of_dtypes(dtype, factor_dtype, dropout_p):
    check(call(rows=67, columns=520, rank=17, dtype=dtype, factor_dtype=factor_dtype, dropout_p=dropout_p))


@EACH_DTYPE
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 255, 256, 257, 264, 1031])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 31, 32, 33, 130])
def test_edges_of_a_tile_are_exact(dtype, rows, columns):
    check_exact(call(rows=rows, columns=columns, rank=3, dtype=dtype, integers=True))


@EACH_DTYPE
@pytest.mark.parametrize("rank", [1, 8, 15, 16, 17, 33, 64, 200])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_ranks_are_exact(dtype, rank, layout):
    exact = call(rows=37, columns=300, rank=rank, dtype=dtype, integers=True)
    check_exact(exact.map(lambda tensor: tensor, factor=laid_out(exact.arguments["factor"], layout)))


@EACH_DTYPE
@pytest.mark.parametrize("argument", ["out", "hidden", "factor"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_exact(dtype, argument, layout):
    exact = call(rows=37, columns=264, rank=5, dtype=dtype, integers=True)
    check_exact(exact.map(lambda tensor: tensor, **{argument: laid_out(exact.arguments[argument], layout)}))


@EACH_DTYPE
def test_memory_around_out_is_left_alone(dtype):
    arguments = call(rows=34, columns=259, rank=5, dtype=dtype).arguments
    frame = torch.full((38, 263), 7.0, dtype=dtype, device="cuda")
    inside = frame[2:36, 2:261]
    accumulate_(inside, arguments["hidden"], arguments["factor"], 1.0, 0.0, None)
    assert (inside != 7.0).any()
    inside.fill_(7.0)
    assert (frame == 7.0).all()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (3, 16), (5, 17), (300, 33), (3, 4096)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.05, 1.0])
def test_masks_are_the_same_bits_as_the_reference(shape, dropout_p):
    state = torch.tensor([-(2**62) + 3, 2**61 + 11])
    expected = philox.dropout_mask(*shape, dropout_p, state)
    assert torch.equal(dropout_mask(*shape, dropout_p, state.cuda()).cpu(), expected)


def test_accumulate_drops_what_the_mask_says():
    dropped = call(rows=70, columns=300, rank=4, dropout_p=0.5)
    (actual,) = dropped.run(accumulate_)
    keep = philox.dropout_mask(70, 300, 0.5, dropped.arguments["rng_state"].cpu()).cuda()
    assert torch.equal(actual != dropped.arguments["out"], keep)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(0, 8, 2), (8, 0, 2), (8, 8, 0)])
def test_nothing_to_do_changes_nothing(rows, columns, rank):
    nothing = call(rows=rows, columns=columns, rank=rank)
    (actual,) = nothing.run(accumulate_)
    assert_same_bits(actual, nothing.arguments["out"])


@EACH_DTYPE
def test_repeated_runs_give_the_same_bits(dtype):
    again = call(rows=130, columns=1000, rank=33, dtype=dtype, dropout_p=0.2)
    (first,) = again.run(accumulate_)
    for _ in range(5):
        assert_same_bits(again.run(accumulate_)[0], first)


def test_no_memory_is_allocated():
    arguments = call(rows=64, columns=512, rank=8, dropout_p=0.1).arguments
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    accumulate_(*arguments.values())
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_kernels_run_on_the_current_stream():
    out = torch.zeros(32, 256, device="cuda")
    hidden, factor = torch.zeros(32, 4, device="cuda"), torch.ones(4, 256, device="cuda")
    state = torch.zeros(2, dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        hidden.fill_(1.0)  # on any other stream the kernels would run before these
        state.fill_(5)
        accumulate_(out, hidden, factor, 1.0, 0.0, None)
        mask = dropout_mask(32, 256, 0.5, state)
    stream.synchronize()
    assert (out == 4.0).all()
    assert torch.equal(mask.cpu(), philox.dropout_mask(32, 256, 0.5, torch.tensor([5, 5])))


def test_calls_return_before_the_gpu_is_done():
    arguments = call(rows=32, columns=256, rank=4, dropout_p=0.5).arguments
    accumulate_(*arguments.values())  # loads the kernels, which may wait
    dropout_mask(32, 256, 0.5, arguments["rng_state"])
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    accumulate_(*arguments.values())
    dropout_mask(32, 256, 0.5, arguments["rng_state"])
    done = torch.cuda.Event()
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


def test_graph_replays_follow_their_inputs():
    arguments = call(rows=40, columns=264, rank=4, dropout_p=0.5, integers=True).arguments
    out, state = arguments["out"], arguments["rng_state"]
    start = out.clone()
    accumulate_(*arguments.values())  # loads the kernels before the capture
    dropout_mask(40, 264, 0.5, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        accumulate_(*arguments.values())
        mask = dropout_mask(40, 264, 0.5, state)
    masks = []
    for seed in (1, 2):
        out.copy_(start)
        state.fill_(seed)
        arguments["hidden"].fill_(seed)
        graph.replay()
        replayed = call(rows=40, columns=264, rank=4, dropout_p=0.5, integers=True)
        expected = replayed.map(lambda t: t, out=start, hidden=arguments["hidden"], rng_state=state)
        assert_same_bits(out, formula(expected, torch.float64)[0].float())
        masks.append(mask.clone())
    assert not torch.equal(*masks)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    exact = random_call("lora_accumulate_", rows=40, columns=264, rank=4, integers=True, device="cuda:1")
    with torch.cuda.device(0):
        check_exact(exact)
        mask = dropout_mask(5, 9, 0.5, torch.tensor([1, 2], device="cuda:1"))
        assert torch.cuda.current_device() == 0
    assert mask.device == torch.device("cuda:1")


def test_offsets_beyond_two_to_the_31():
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1":
        pytest.skip("too large for compute-sanitizer, which this setting accompanies")
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    rows, columns = 2**17 + 3, 2**14 + 8
    out = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    hidden, factor = torch.ones(rows, 1, device="cuda"), torch.ones(1, columns, device="cuda")
    state = torch.tensor([3, 4], device="cuda")
    accumulate_(out, hidden, factor, 1.0, 0.5, state)
    for row in (0, rows // 2, rows - 1):
        assert torch.equal(out[row].cpu() == 2.0, row_of_mask(row, columns, 0.5, 3, 4))
    assert ((out == 0.0) | (out == 2.0)).all()


def row_of_mask(row, columns, dropout_p, seed, offset):
    """One row of the reference mask, without the rows before it."""
    group, zero = torch.arange((columns + 7) // 8), torch.zeros((), dtype=torch.int64)
    words = philox.philox_4x32_10((group, zero + row, zero + offset, zero), (zero + seed, zero))
    draws = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1).flatten()[:columns]
    return draws >= philox.dropout_threshold(dropout_p)


def good():
    return {
        "out": torch.zeros(4, 6, device="cuda"),
        "hidden": torch.ones(4, 2, device="cuda"),
        "factor": torch.ones(2, 6, device="cuda"),
        "scaling": 1.0,
        "dropout_p": 0.5,
        "rng_state": torch.tensor([1, 2], device="cuda"),
    }


BAD = {
    "out of another dtype": ("out", lambda t: t.double(), r"float32, bfloat16 or float16 \[M, C\], got float64"),
    "out of three dimensions": ("out", lambda t: t[None], r"\[M, C\], got float32 \[1, 4, 6\]"),
    "out overlaps": ("out", lambda t: t[:1].expand(4, 6), r"not overlap itself in memory, got .* strides \[0, 1\]"),
    "hidden on cpu": ("hidden", lambda t: t.cpu(), r"float32 \[4, r\] on out's device, got .* on cpu"),
    "hidden in bfloat16": ("hidden", lambda t: t.bfloat16(), r"float32 \[4, r\].*, got bfloat16"),
    "hidden of other rows": ("hidden", lambda t: t[:3], r"float32 \[4, r\].*, got float32 \[3, 2\]"),
    "factor of another rank": ("factor", lambda t: t[:1], r"\[2, 6\].*, got float32 \[1, 6\]"),
    "factor of other columns": ("factor", lambda t: t[:, :5], r"\[2, 6\].*, got float32 \[2, 5\]"),
    "factor of integers": ("factor", lambda t: t.long(), r"float32, .*, got int64"),
    "factor on cpu": ("factor", lambda t: t.cpu(), r"on out's device, got .* on cpu"),
    "dropout_p above 1": ("dropout_p", lambda _: 1.5, r"a probability in \[0, 1\], got 1.5"),
    "dropout_p is NaN": ("dropout_p", lambda _: float("nan"), r"a probability in \[0, 1\], got nan"),
    "rng_state on cpu": ("rng_state", lambda t: t.cpu(), r"on out's device, got int64 \[2\] on cpu"),
    "rng_state of int32": ("rng_state", lambda t: t.int(), r"int64 \[2\].*, got int32 \[2\]"),
    "rng_state of three": ("rng_state", lambda t: t.new_ones(3), r"int64 \[2\].*, got int64 \[3\]"),
}


@pytest.mark.parametrize(("argument", "change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named_and_nothing_changes(argument, change, message):
    arguments = good()
    arguments[argument] = change(arguments[argument])
    before = arguments["out"].clone()
    with pytest.raises(RuntimeError, match=rf"lora_accumulate_: {argument} must .*{message}"):
        accumulate_(*arguments.values())
    assert_same_bits(arguments["out"], before)
    accumulate_(*good().values())  # no error lingers
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    ("rows", "columns", "dropout_p", "message"),
    [
        (-1, 4, 0.5, r"dropout needs between 0 and 2\^32 rows, got -1"),
        (4, -1, 0.5, "columns must not be negative, got -1"),
        (4, 4, -0.5, r"dropout_p must be a probability in \[0, 1\], got -0.5"),
    ],
)
def test_bad_masks_are_refused(rows, columns, dropout_p, message):
    with pytest.raises(RuntimeError, match=message):
        dropout_mask(rows, columns, dropout_p, torch.tensor([1, 2], device="cuda"))
