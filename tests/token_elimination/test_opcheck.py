"""`torch.library.opcheck` of the raw operators."""

from __future__ import annotations

import pytest
import torch

from ..support.places import compiled_cases, dtype_name
from ..support.token_elimination import OPERATORS, arguments, variants


@pytest.mark.parametrize(("namespace", "device", "operator"), compiled_cases((operator,) for operator in OPERATORS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("size", [(9, 6), (0, 6)], ids=str)
def test_operators(namespace, device, operator, dtype, size):
    for variant in variants(operator):
        call = arguments(operator, size, "sequences", dtype, device, variant)
        torch.library.opcheck(getattr(getattr(torch.ops, namespace), operator).default, tuple(call.values()))
