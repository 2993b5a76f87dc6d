"""What only a GPU can show: more than 2^31 elements, and capture in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from peft_kernels.triton_kernels import lora
from peft_kernels.triton_kernels.common import INTERPRETING

from ..support.accuracy import assert_same_bits

pytestmark = pytest.mark.skipif(INTERPRETING, reason="needs a GPU")
COLUMNS = 4096
ROWS = 2**31 // COLUMNS + 70
TAIL = 130  # rows at the end, which lie beyond element 2^31


@pytest.fixture
def x():
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    x = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16, device="cuda")
    x[-TAIL:] = torch.randn(TAIL, COLUMNS, device="cuda")
    return x


def test_shrink_of_more_than_2_to_the_31_elements(x):
    factor = torch.randn(16, COLUMNS, device="cuda").bfloat16()
    hidden = lora.lora_shrink(x, factor, 1.0, 0.0, None)
    torch.testing.assert_close(hidden[-TAIL:], x[-TAIL:].float() @ factor.t().float(), rtol=1e-3, atol=1e-2)
    assert not hidden[:-TAIL].any()


def test_factor_grad_of_more_than_2_to_the_31_elements(x):
    hidden = torch.randn(ROWS, 16, device="cuda").bfloat16().float()
    grad = lora.lora_factor_grad(x, hidden, 1.0, 0.0, None, torch.float32, False)
    torch.testing.assert_close(grad, hidden[-TAIL:].t() @ x[-TAIL:].float(), rtol=1e-3, atol=1e-2)


def test_accumulate_into_more_than_2_to_the_31_elements(x):
    before = x[-TAIL:].clone()
    hidden = torch.zeros(ROWS, 1, device="cuda")
    hidden[-TAIL:] = 1.0
    lora.lora_accumulate_(x, hidden, torch.ones(1, COLUMNS, device="cuda"), 2.0, 0.0, None)
    assert_same_bits(x[-TAIL:], (before.float() + 2.0).bfloat16())
    assert not x[:-TAIL].any()


def test_masks_follow_a_replayed_graph():
    rng_state = torch.tensor([1, 2], device="cuda")
    lora.dropout_mask(50, 70, 0.5, rng_state)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = lora.dropout_mask(50, 70, 0.5, rng_state)
    for seed in (3, 4):
        rng_state.copy_(torch.tensor([seed, 5]))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(mask, lora.dropout_mask(50, 70, 0.5, torch.tensor([seed, 5], device="cuda")))
