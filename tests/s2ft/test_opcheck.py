"""`torch.library.opcheck` of the raw operators, and what `torch.compile` makes of calls that change a weight."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.backends import DTYPES

from ..support.accuracy import assert_same_bits
from ..support.places import compiled_cases, dtype_name
from ..support.s2ft import CHANGED, IN_PLACE, random_channels, random_slice

EACH_IN_PLACE = pytest.mark.parametrize(
    ("namespace", "device", "operator"), compiled_cases((name,) for name in IN_PLACE)
)
WITHOUT = {
    "slice_write_": {},
    "slice_exchange_": {"held_indices": None, "held": None},
    "slice_adamw_": {"weight": None, "indices": None},
}


def raw_operator(namespace, name):
    return getattr(getattr(torch.ops, namespace), name).default


def skip_float64_on_cuda(device, dtype):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("CUDA kernels do not take float64")


@EACH_IN_PLACE
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("count", [5, 0])
def test_in_place_operators(namespace, device, operator, dtype, count):
    skip_float64_on_cuda(device, dtype)
    for dim, changes in ((0, {}), (1, {}), (1, WITHOUT[operator])):
        arguments = random_slice(count=count, dim=dim, dtype=dtype, device=device).arguments(operator, **changes)
        torch.library.opcheck(raw_operator(namespace, operator), tuple(arguments.values()))


def calls(operator, rows, dtype, device):
    gate, up = torch.randn(2, rows, 24, device=device).to(dtype)
    grad_out, indices = torch.randn(rows, 20, device=device).to(dtype), random_channels(20, 5).to(device)
    return {
        "gather_columns": [(gate, indices), (up.t().contiguous().t(), indices)],
        "slice_grad": [(grad_out, gate, indices, torch.float32), (grad_out, gate[:, :3], None, dtype)],
        "swiglu": [(gate, up, indices), (gate, up, indices[:0])],
        "swiglu_backward": [(up, gate, up.t().contiguous().t())],
    }[operator]


@pytest.mark.parametrize(
    ("namespace", "device", "operator"),
    compiled_cases((name,) for name in ("gather_columns", "slice_grad", "swiglu", "swiglu_backward")),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("rows", [9, 0])
def test_operators_with_results(namespace, device, operator, dtype, rows):
    for arguments in calls(operator, rows, dtype, device):
        torch.library.opcheck(raw_operator(namespace, operator), arguments)


@pytest.fixture
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@EACH_IN_PLACE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_compiled_equals_eager(namespace, device, operator, dtype, nothing_compiled_before):
    # Between two operations on what is changed, so that an order that is not kept shows.
    kernel = raw_operator(namespace, operator)
    own = random_slice(dtype=dtype, device=device)

    def call(arguments):
        changed = [arguments[name] for name in CHANGED[operator]]
        before = [tensor + 1 for tensor in changed]
        kernel(*arguments.values())
        return before, [tensor * 2 for tensor in changed]

    eager, compiled = (own.copy().arguments(operator) for _ in range(2))
    expected = call(eager)
    actual = torch.compile(call, fullgraph=True, backend="aot_eager")(compiled)
    for left, right in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert_same_bits(left, right)
    for name, argument in eager.items():
        if isinstance(argument, torch.Tensor):
            assert_same_bits(compiled[name], argument, name)
