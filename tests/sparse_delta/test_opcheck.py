"""`torch.library.opcheck` of the raw operators, and what `torch.compile` makes of calls to them."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.backends import DTYPES

from ..support.accuracy import assert_same_bits
from ..support.places import compiled_cases, dtype_name
from ..support.sparse_delta import CHANGED, IN_PLACE, random_delta

EACH_OPERATOR = pytest.mark.parametrize(
    ("namespace", "device", "operator"), compiled_cases((name,) for name in IN_PLACE)
)
WITHOUT = {
    "scatter_write_": {"values": None},
    "scatter_accumulate_": {"scaling": 1.0},
    "sparse_adamw_": {"weight": None, "indices": None, "original": None},
    "sparse_sm3_": {"exp_avg": None, "weight": None, "original": None},
}
"""The other form of each call."""


def raw_operator(namespace, name):
    return getattr(getattr(torch.ops, namespace), name).default


def skip_float64_on_cuda(device, dtype):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("CUDA kernels do not take float64")


@EACH_OPERATOR
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=dtype_name)
@pytest.mark.parametrize("count", [37, 0])
def test_operator(namespace, device, operator, dtype, index_dtype, count):
    skip_float64_on_cuda(device, dtype)
    delta = random_delta(count=count, dtype=dtype, index_dtype=index_dtype, device=device)
    for changes in ({}, WITHOUT[operator]):
        arguments = delta.arguments(operator, **changes)
        torch.library.opcheck(raw_operator(namespace, operator), tuple(arguments.values()))


@pytest.fixture
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@EACH_OPERATOR
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("form", ["whole", "other"])
def test_compiled_equals_eager(namespace, device, operator, dtype, form, nothing_compiled_before):
    # Between two operations on what is changed, so that an order that is not kept shows.
    kernel = raw_operator(namespace, operator)
    delta = random_delta(dtype=dtype, device=device)
    changes = {} if form == "whole" else WITHOUT[operator]

    def call(arguments):
        changed = [arguments[name] for name in CHANGED[operator] if arguments[name] is not None]
        before = [tensor + 1 for tensor in changed]
        kernel(*arguments.values())
        return before, [tensor * 2 for tensor in changed]

    eager, compiled = (delta.copy().arguments(operator, **changes) for _ in range(2))
    expected = call(eager)
    actual = torch.compile(call, fullgraph=True, backend="aot_eager")(compiled)
    for left, right in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert_same_bits(left, right)
    for name, argument in eager.items():
        if isinstance(argument, torch.Tensor):
            assert_same_bits(compiled[name], argument, name)
