"""The CUDA operators among streams, graphs, devices and the allocator; and how they refuse bad arguments."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.reference import philox

from ..support.accuracy import assert_same_bits
from ..support.operators import ACTIVATIONS, OPERATORS, random_call
from . import cuda
from .cuda import check_exact, gpu_call, kernel

cuda.require()

pytestmark = pytest.mark.gpu

# One kernel that changes its argument, and two operators that start several and allocate between them.
EACH_OPERATOR = pytest.mark.parametrize("operator", ["lora_accumulate_", "lora_linear_forward", "lora_linear_backward"])
# A wait for the GPU, long beside a launch and short beside a test.
SLEEP_CYCLES = 200_000_000

accumulate_, dropout_mask = kernel("lora_accumulate_"), kernel("dropout_mask")


def example(operator, seed=0, device=cuda.DEVICE):
    """In bfloat16, with all kernels our own; the sums over the rows are split."""
    sizes = {"rows": 300, "columns": 264, "out_columns": 136, "rank": 4}
    options = {"dtype": torch.bfloat16, "dropout_p": 0.5, "integers": True}
    return random_call(operator, **sizes, **options, seed=seed, device=device)


def tensors(call):
    return {name: value for name, value in call.arguments.items() if isinstance(value, torch.Tensor)}


def run_in_place(call):
    """The results, that of `lora_accumulate_` in the call's own `out`."""
    result = kernel(call.operator)(*call.arguments.values())
    if call.operator == "lora_accumulate_":
        return (call.arguments["out"],)
    return result if isinstance(result, tuple) else (result,)


def assert_same_results(actual, expected):
    for left, right in zip(actual, expected, strict=True):
        assert_same_bits(left, right)


@EACH_OPERATOR
def test_kernels_run_on_the_current_stream(operator):
    call = example(operator)
    expected = call.run(kernel(operator))
    late = call.map(torch.zeros_like, rng_state=torch.zeros_like(call.arguments["rng_state"]))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        for name, tensor in tensors(call).items():
            late.arguments[name].copy_(tensor)  # on any other stream the kernels would run before this
        results = run_in_place(late)
    stream.synchronize()
    assert_same_results(results, expected)


def test_masks_are_drawn_on_the_current_stream():
    state = torch.zeros(2, dtype=torch.int64, device=cuda.DEVICE)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        state.fill_(5)
        mask = dropout_mask(32, 256, 0.5, state)
    stream.synchronize()
    assert torch.equal(mask.cpu(), philox.dropout_mask(32, 256, 0.5, torch.tensor([5, 5])))


@EACH_OPERATOR
def test_calls_return_before_the_gpu_is_done(operator):
    call = example(operator)
    run_in_place(call)  # loads the kernels and takes memory, which may wait
    dropout_mask(32, 256, 0.5, call.arguments["rng_state"])
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    run_in_place(call)
    dropout_mask(32, 256, 0.5, call.arguments["rng_state"])
    done = torch.cuda.Event()
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


@EACH_OPERATOR
def test_graph_replays_follow_their_inputs(operator):
    static = example(operator)
    run_in_place(static)  # loads the kernels before the capture
    dropout_mask(40, 264, 0.5, static.arguments["rng_state"])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_in_place(static)
        mask = dropout_mask(40, 264, 0.5, static.arguments["rng_state"])
    masks = []
    for seed in (1, 2):
        fresh = example(operator, seed)
        for name, tensor in tensors(fresh).items():
            static.arguments[name].copy_(tensor)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_results(captured, fresh.run(kernel(operator)))
        expected = philox.dropout_mask(40, 264, 0.5, fresh.arguments["rng_state"].cpu())
        assert torch.equal(mask.cpu(), expected)
        masks.append(expected)
    assert not torch.equal(*masks)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@EACH_OPERATOR
def test_a_device_that_is_not_the_current_one(operator):
    call = example(operator, device="cuda:1")
    with torch.cuda.device(0):
        results = check_exact(call)
        mask = dropout_mask(5, 9, 0.5, torch.tensor([1, 2], device="cuda:1"))
        assert torch.cuda.current_device() == 0
    assert {tensor.device for tensor in (*results, mask)} == {torch.device("cuda:1")}


def test_accumulate_allocates_nothing():
    arguments = gpu_call("lora_accumulate_", rows=64, columns=512, rank=8, dropout_p=0.1).arguments
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    accumulate_(*arguments.values())
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (8, 0)])
def test_nothing_to_do_changes_nothing(rows, columns):
    nothing = gpu_call("lora_accumulate_", rows=rows, columns=columns, rank=2)
    assert_same_results(nothing.run(accumulate_), [nothing.arguments["out"]])


GOOD = {"rows": 4, "columns": 6, "rank": 2, "dropout_p": 0.5}
BAD = {
    "out of another dtype": (
        "out",
        lambda t: t.double(),
        r"must be float32, bfloat16 or float16, got float64",
    ),
    "out of three dimensions": ("out", lambda t: t[None], r"must be 2-D, got float32 \[1, 4, 6\]"),
    "out overlaps": ("out", lambda t: t[:1].expand(4, 6), r"must not overlap itself .*, got .* strides \[0, 1\]"),
    "hidden in bfloat16": ("hidden", lambda t: t.bfloat16(), r"must be float32 .*, got bfloat16 \[4, 2\]"),
    "hidden of other rows": ("hidden", lambda t: t[:3], r"must be \[4, rank >= 1\], got float32 \[3, 2\]"),
    "hidden of no rank": ("hidden", lambda t: t[:, :0], r"must be \[4, rank >= 1\], got float32 \[4, 0\]"),
    "factor of another rank": ("factor", lambda t: t[:1], r"must have hidden's rank 2, got float32 \[1, 6\]"),
    "factor of other columns": ("factor", lambda t: t[:, :5], r"must be \[rank >= 1, 6\], got float32 \[2, 5\]"),
    "factor of integers": ("factor", lambda t: t.long(), r"must be float32, bfloat16 or float16, got int64"),
    "factor of float64": ("factor", lambda t: t.double(), r"must be float64 if and only if .*, got float64"),
    "dropout_p above 1": ("dropout_p", lambda _: 1.5, r"must be a probability in \[0, 1\], got 1.5"),
    "dropout_p is NaN": ("dropout_p", lambda _: float("nan"), r"must be a probability in \[0, 1\], got nan"),
    "rng_state is missing": ("rng_state", lambda _: None, r"must be given when dropout_p > 0, got None"),
    "rng_state of int32": ("rng_state", lambda t: t.int(), r"must be int64 \[2\] .*, got int32 \[2\]"),
    "rng_state of three": ("rng_state", lambda t: t.new_ones(3), r"must be int64 \[2\] .*, got int64 \[3\]"),
}


@pytest.mark.parametrize(("argument", "change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named_and_nothing_changes(argument, change, message):
    arguments = gpu_call("lora_accumulate_", **GOOD).arguments
    arguments[argument] = change(arguments[argument])
    before = arguments["out"].clone()
    with pytest.raises(RuntimeError, match=rf"lora_accumulate_: {argument} .*{message}"):
        accumulate_(*arguments.values())
    assert_same_bits(arguments["out"], before)
    check_exact(gpu_call("lora_accumulate_", **GOOD, integers=True))  # no error lingers
    torch.cuda.synchronize()


ELSEWHERE = [
    pytest.param(operator, name, id=f"{operator}-{name}")
    for operator in OPERATORS
    for name, value in random_call(operator, dropout_p=0.5).arguments.items()
    if isinstance(value, torch.Tensor) and name != ACTIVATIONS[operator]
]


@pytest.mark.parametrize(("operator", "argument"), ELSEWHERE)
def test_arguments_on_another_device_are_named(operator, argument):
    arguments = gpu_call(operator, dropout_p=0.5).arguments
    arguments[argument] = arguments[argument].cpu()
    message = rf"{operator}: {argument} must be on cuda:0 like the other arguments, got .* on cpu"
    with pytest.raises(RuntimeError, match=message):
        kernel(operator)(*arguments.values())


@pytest.mark.parametrize(
    ("rows", "columns", "dropout_p", "message"),
    [
        (-1, 4, 0.5, r"rows and columns must not be negative, got -1, 4"),
        (4, -1, 0.5, r"rows and columns must not be negative, got 4, -1"),
        (2**32 + 1, 1, 0.5, r"dropout needs at most 2\^32 rows, got 4294967297"),
        (4, 4, -0.5, r"dropout_p must be a probability in \[0, 1\], got -0.5"),
    ],
)
def test_bad_masks_are_refused(rows, columns, dropout_p, message):
    with pytest.raises(RuntimeError, match=rf"dropout_mask: {message}"):
        dropout_mask(rows, columns, dropout_p, torch.tensor([1, 2], device=cuda.DEVICE))
