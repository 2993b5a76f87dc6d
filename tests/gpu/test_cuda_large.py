"""More than 2^31 elements: offsets that 32 bits do not hold."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.reference import philox

from . import cuda

cuda.require()

pytestmark = pytest.mark.gpu

COLUMNS = 2**14 + 8
ROWS = 2**17 + 3
EDGE = 130  # rows at either end; those at the end lie beyond element 2^31


@pytest.fixture(autouse=True)
def room():
    """16 GiB, given back afterwards."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def x():
    """Zero, but for small integers in the last rows."""
    x = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16, device=cuda.DEVICE)
    x[-EDGE:] = torch.randint(-2, 3, (EDGE, COLUMNS), device=cuda.DEVICE)
    return x


def integers(*shape, dtype=torch.float32):
    return torch.randint(-2, 3, shape, device=cuda.DEVICE).to(dtype)


def test_shrink(x):
    factor = integers(16, COLUMNS, dtype=torch.bfloat16)
    hidden = cuda.kernel("lora_shrink")(x, factor, 1.0, 0.0, None)
    assert torch.equal(hidden[-EDGE:].double(), x[-EDGE:].double() @ factor.t().double())
    assert not hidden[:-EDGE].any()


def test_factor_grad(x):
    hidden = integers(ROWS, 16)
    grad = cuda.kernel("lora_factor_grad")(x, hidden, 1.0, 0.0, None, torch.float32, False)
    assert torch.equal(grad.double(), hidden[-EDGE:].t().double() @ x[-EDGE:].double())


def test_matmul():
    x, matrix = integers(ROWS, 16, dtype=torch.bfloat16), integers(16, COLUMNS, dtype=torch.bfloat16)
    hidden, factor = integers(ROWS, 3), integers(3, COLUMNS)
    y = cuda.kernel("lora_matmul")(x, matrix, None, hidden, factor, 0.5, 0.0, None)
    for rows in (slice(0, EDGE), slice(ROWS // 2, ROWS // 2 + EDGE), slice(-EDGE, None)):
        exact = x[rows].double() @ matrix.double() + 0.5 * hidden[rows].double() @ factor.double()
        assert torch.equal(y[rows], exact.bfloat16())


def test_accumulate():
    out = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16, device=cuda.DEVICE)
    hidden, factor = torch.ones(ROWS, 1, device=cuda.DEVICE), torch.ones(1, COLUMNS, device=cuda.DEVICE)
    state = torch.tensor([3, 4], device=cuda.DEVICE)
    cuda.kernel("lora_accumulate_")(out, hidden, factor, 1.0, 0.5, state)
    for row in (0, ROWS // 2, ROWS - 1):
        assert torch.equal(out[row].cpu() == 2.0, row_of_mask(row, 0.5, 3, 4))
    assert (out[-EDGE:] != 0.0).any()


def test_gather_columns(x):
    channels = torch.arange(5, COLUMNS, 101, device=cuda.DEVICE)
    columns = cuda.kernel("gather_columns")(x, channels)
    assert torch.equal(columns[-EDGE:], x[-EDGE:, channels])
    assert not columns[:-EDGE].any()


def test_swiglu(x):
    channels = torch.arange(5, COLUMNS, 101, device=cuda.DEVICE)
    h, kept = cuda.kernel("swiglu")(x, x, channels)
    wide = x[-EDGE:].double()
    torch.testing.assert_close(h[-EDGE:].double(), wide * wide * wide.sigmoid(), rtol=2**-8, atol=0.0)
    assert torch.equal(kept[-EDGE:], h[-EDGE:, channels])
    assert not h[:-EDGE].any() and not kept[:-EDGE].any()


def test_slice_write():
    weight = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16, device=cuda.DEVICE)
    channels = torch.tensor([3, COLUMNS - 1], device=cuda.DEVICE)
    cuda.kernel("slice_write_")(weight, channels, torch.ones(ROWS, 2, device=cuda.DEVICE), 1)
    assert int(weight[-EDGE:].sum()) == 2 * EDGE and bool((weight[:, channels] == 1.0).all())


def test_slice_exchange():
    weight = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16, device=cuda.DEVICE)
    channels, held_channels = (torch.tensor([first, COLUMNS - 1], device=cuda.DEVICE) for first in (3, 5))
    held = torch.full((ROWS, 2), 2.0, dtype=torch.bfloat16, device=cuda.DEVICE)
    change, original = torch.ones(ROWS, 2, device=cuda.DEVICE), torch.empty_like(held)
    cuda.kernel("slice_exchange_")(weight, held_channels, held, channels, change, original, 1)
    assert bool((weight[:, [3, 5, COLUMNS - 1]] == torch.tensor([1.0, 2.0, 3.0], device=cuda.DEVICE)).all())
    assert int(weight[-EDGE:].sum()) == 6 * EDGE and bool((original[:, 1] == 2.0).all())


def test_rows_are_gathered_and_added(x):
    rows = torch.arange(1, ROWS, 2, dtype=torch.int32, device=cuda.DEVICE)
    kept = cuda.kernel("gather_rows")(x, rows)
    assert torch.equal(kept[-EDGE // 2 :], x[rows[-EDGE // 2 :].long()])
    y = cuda.kernel("scatter_add_rows")(x, kept, rows)
    expected = x[-EDGE:].clone()
    expected[torch.isin(torch.arange(ROWS - EDGE, ROWS, device=cuda.DEVICE), rows)] *= 2
    assert torch.equal(y[-EDGE:], expected)
    assert not y[:-EDGE].any()
    cuda.kernel("scatter_add_rows_")(x, kept, rows)
    assert torch.equal(x[-EDGE:], expected)


def test_norm_of_rows(x):
    weight = torch.ones(COLUMNS, device=cuda.DEVICE)
    h, _, rstd = cuda.kernel("gather_rms_norm")(x, None, weight, 1e-5, 0.0)
    wide = x[-EDGE:].double()
    exact = (wide.square().mean(1) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd[-EDGE:].double(), exact, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(h[-EDGE:].double(), wide * exact[:, None], rtol=2**-8, atol=0.0)
    assert not h[:-EDGE].any()
    del h
    dx, _ = cuda.kernel("gather_rms_norm_backward")(None, x, x, rstd, weight, 0.0, None, ROWS, False)
    n = wide * exact[:, None]
    expected = exact[:, None] * (wide - n * (wide * n).mean(1, keepdim=True))
    torch.testing.assert_close(dx[-EDGE:].double(), expected, rtol=2**-7, atol=1e-4)


def test_heads_are_rotated():
    heads = COLUMNS // 8
    x = torch.zeros(ROWS, heads, 8, dtype=torch.bfloat16, device=cuda.DEVICE)
    x[-1] = integers(heads, 8, dtype=torch.bfloat16)
    cos, sin = torch.zeros(3, 8, device=cuda.DEVICE), torch.ones(3, 8, device=cuda.DEVICE)
    rows = torch.full((ROWS,), 2, dtype=torch.int32, device=cuda.DEVICE)
    turned = cuda.kernel("rope_rows")(x, cos, sin, rows, False)
    assert torch.equal(turned[-1], torch.cat([-x[-1, :, 4:], x[-1, :, :4]], 1) + 0.0)


def test_cross_entropy(x):
    labels = torch.full((ROWS,), 7, device=cuda.DEVICE)
    wide = x[-EDGE:].float()
    losses = cuda.kernel("cross_entropy_rows_")(x, labels, 1.0)
    exact = torch.nn.functional.cross_entropy(wide, labels[-EDGE:], reduction="none")
    torch.testing.assert_close(losses[-EDGE:], exact, rtol=1e-5, atol=1e-5)
    gradient = wide.softmax(1)
    gradient[:, 7] -= 1.0
    torch.testing.assert_close(x[-EDGE:].float(), gradient, rtol=2**-7, atol=1e-7)


def row_of_mask(row, dropout_p, seed, offset):
    """One row of the reference mask, without the rows before it."""
    group, zero = torch.arange((COLUMNS + 7) // 8), torch.zeros((), dtype=torch.int64)
    words = philox.philox_4x32_10((group, zero + row, zero + offset, zero), (zero + seed, zero))
    draws = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1).flatten()[:COLUMNS]
    return draws >= philox.dropout_threshold(dropout_p)
