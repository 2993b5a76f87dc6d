"""Every kernel that drops elements drops the reference's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from peft_kernels.triton_kernels import lora

from peft_kernels.reference.philox import dropout_mask

from ..support import philox

SEEDS = [(0, 0), (-1, -1), (2**63 - 1, -(2**63)), (-(2**63), 2**63 - 1), (2**32 + 5, -(2**32) + 7)]
P = 0.5  # where kept elements are scaled by exactly 2


def state(place, seed=-(2**62) + 3, offset=2**61 + 11):
    return torch.tensor([seed, offset], dtype=torch.int64, device=place.device)


@pytest.mark.parametrize(("seed", "offset"), SEEDS)
def test_mask_follows_the_documented_layout(place, seed, offset):
    mask = lora.dropout_mask(5, 29, 0.4, state(place, seed, offset))
    assert torch.equal(mask.cpu(), philox.keep_mask(5, 29, 0.4, seed, offset))


@pytest.mark.parametrize("dropout_p", [0.0, 2.0**-16, 0.05, 0.9, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (31, 7), (33, 255), (70, 257), (2, 1001), (0, 5), (5, 0)])
def test_mask_equals_the_reference(place, rows, columns, dropout_p):
    mask = lora.dropout_mask(rows, columns, dropout_p, state(place))
    assert torch.equal(mask, dropout_mask(rows, columns, dropout_p, state(place)))


def test_mask_takes_a_state_whose_numbers_lie_apart(place):
    apart = torch.stack([state(place), torch.full_like(state(place), 77)], 1)[:, 0]
    assert torch.equal(lora.dropout_mask(9, 40, P, apart), dropout_mask(9, 40, P, state(place)))


@pytest.mark.parametrize(("rows", "columns"), [(3, 9), (70, 40), (20, 131)])
class TestOperators:
    """Ones in, so that the mask comes out: 0 where dropped and 2 where kept, or the sum of a row or column of it."""

    @pytest.fixture
    def expected(self, place, rows, columns):
        return dropout_mask(rows, columns, P, state(place)) * 2.0

    def test_shrink(self, place, dtype, rows, columns, expected):
        x = torch.ones(rows, columns, dtype=dtype, device=place.device)
        identity = torch.eye(columns, dtype=dtype, device=place.device)
        assert torch.equal(lora.lora_shrink(x, identity, 1.0, P, state(place)), expected)

    @pytest.mark.parametrize("transposed", [False, True])
    def test_factor_grad(self, place, dtype, rows, columns, transposed, expected):
        x = torch.ones(rows, columns, dtype=dtype, device=place.device)
        identity = torch.eye(rows, device=place.device)
        grad = lora.lora_factor_grad(x, identity, 1.0, P, state(place), torch.float32, transposed)
        assert torch.equal(grad, expected.t() if transposed else expected)

    def test_accumulate(self, place, dtype, rows, columns, expected):
        out = torch.ones(rows, columns, dtype=dtype, device=place.device)
        hidden = torch.ones(rows, 1, device=place.device)
        lora.lora_accumulate_(out, hidden, torch.ones(1, columns, device=place.device), 1.0, P, state(place))
        assert torch.equal(out, (expected + 1).to(dtype))

    def test_matmul(self, place, dtype, rows, columns, expected):
        x = torch.ones(rows, 6, dtype=dtype, device=place.device)
        matrix = torch.ones(6, columns, dtype=dtype, device=place.device)
        hidden = torch.ones(rows, 1, device=place.device)
        factor = torch.ones(1, columns, device=place.device)
        # The mask is on the rank-r product alone; the big product is whole.
        y = lora.fused_matmul(x, matrix, None, hidden, factor, 1.0, P, state(place))
        assert torch.equal(y, (expected + 6).to(dtype))
