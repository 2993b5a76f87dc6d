"""What a TokenTune layer keeps for backward, counted in bytes and compared with the formula of its docstring."""

from __future__ import annotations

import pytest
import torch

import peft_kernels
from peft_kernels import LoraConfig

from ..token_elimination.models import build
from ..token_elimination.test_saved_by_layers import (
    DEPTH,
    GROUPS,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    RANK,
    SIZES,
    TOKENS,
    saved_bytes,
)
from .models import tuned


def adapted(dtype, **options):
    model = build("llama", dtype, **SIZES)
    peft_kernels.inject(model, LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False))
    if options:
        tuned(model, **options)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.1])
def test_a_layer_keeps_what_the_formula_says(dtype, ratio):
    selected, size = -int(-ratio * TOKENS // 1), dtype.itemsize
    expected = size * (
        selected * (2 * HIDDEN + 2 * HEADS * DEPTH + 2 * INTERMEDIATE) + TOKENS * 2 * GROUPS * DEPTH
    ) + 4 * (2 * selected)
    of_lora = 4 * 7 * RANK * selected  # in each linear layer the product with A, float32
    rows = 4 * selected
    assert saved_bytes(adapted(dtype, ratio=ratio), dtype) == expected + of_lora + rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tenth_of_the_tokens_keeps_a_quarter_of_what_the_dense_layer_does(dtype):
    tuning, dense = (saved_bytes(adapted(dtype, **options), dtype) for options in ({"ratio": 0.1}, {}))
    assert dense >= 4 * tuning
