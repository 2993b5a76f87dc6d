"""`torch.library.opcheck` of every raw operator: schema, mutation, fake kernel, behavior under AOT dispatch."""

from __future__ import annotations

import itertools

import pytest
import torch

from peft_kernels import backends
from peft_kernels.backends import DTYPES

from ..support.operators import DROPPING, OPERATORS, random_call
from ..support.places import compiled_places, dtype_name

EACH_NAMESPACE = pytest.mark.parametrize(("namespace", "device"), compiled_places("lora_accumulate_"))


def raw_operator(namespace, name):
    return getattr(getattr(torch.ops, namespace), name).default


def skip_unless_registered(namespace, operator, device, dtype):
    backend = {"peft_kernels_triton": "triton"}.get(namespace, device)
    reason = backends.obstacle(operator, backend, device, dtype)
    if reason is not None:
        pytest.skip(reason)


@EACH_NAMESPACE
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_operator(namespace, device, operator, dtype, dropout_p):
    skip_unless_registered(namespace, operator, device, dtype)
    if operator not in DROPPING and dropout_p > 0:
        dropout_p = 0.0
    call = random_call(operator, dtype=dtype, dropout_p=dropout_p, device=device)
    torch.library.opcheck(raw_operator(namespace, operator), tuple(call.arguments.values()))


@EACH_NAMESPACE
@pytest.mark.parametrize("operator", ["lora_matmul", "lora_factor_grad", "lora_linear_forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_operator_in_its_other_form(namespace, device, operator, dtype):
    skip_unless_registered(namespace, operator, device, dtype)
    call = random_call(
        operator, dtype=dtype, factor_dtype=torch.float32, bias=False, transposed=True, dropout_p=0.5, device=device
    )
    torch.library.opcheck(raw_operator(namespace, operator), tuple(call.arguments.values()))


@EACH_NAMESPACE
@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_on_strided_and_empty_tensors(namespace, device, operator):
    skip_unless_registered(namespace, operator, device, torch.float32)
    for call in (
        random_call(operator, rows=0, device=device),
        random_call(operator, device=device).map(lambda t: torch.cat([t, t], 0)[: 2 * len(t) : 2]),
    ):
        torch.library.opcheck(raw_operator(namespace, operator), tuple(call.arguments.values()))


@EACH_NAMESPACE
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_backward_of_the_layer_for_whatever_is_needed(namespace, device, needs):
    operator = "lora_linear_backward"
    skip_unless_registered(namespace, operator, device, torch.float32)
    call = random_call(operator, needs=needs, dropout_p=0.5, device=device)
    if not call.arguments["need_a"]:
        call = call.map(lambda tensor: tensor, x=None)
    torch.library.opcheck(raw_operator(namespace, operator), tuple(call.arguments.values()))


@EACH_NAMESPACE
@pytest.mark.parametrize("columns", [1, 37])
def test_dropout_mask(namespace, device, columns):
    skip_unless_registered(namespace, "dropout_mask", device, torch.float32)
    state = torch.tensor([3, 4], device=device)
    torch.library.opcheck(raw_operator(namespace, "dropout_mask"), (9, columns, 0.5, state))
