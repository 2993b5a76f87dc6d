"""Kernels of slices of channels in the executor: runs of channels at every alignment, chunks, every order of threads.

What every backend must do is in tests/s2ft, which runs on these kernels as well (`make simulated`).
"""

from __future__ import annotations

import pytest
import torch

from peft_kernels.reference import s2ft as reference

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.places import dtype_name
from . import build

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
DIM = pytest.mark.parametrize("dim", [0, 1])
WIDTH = 96
CHANNELS = {
    "a run": range(8, 40),
    "an unaligned run": range(3, 40),
    "heads": (*range(16), *range(48, 64)),
    "runs of many lengths": (0, 1, 3, 4, 5, 6, 10, 11, 12, 13, 14, 15, 16, 17, 18, 40, 95),
    "every third": range(0, WIDTH, 3),
    "all": range(WIDTH),
    "the last": (WIDTH - 1,),
}
EACH_CHOICE = pytest.mark.parametrize("chosen", CHANNELS.values(), ids=CHANNELS.keys())
ADAMW = (3, 0.02, 0.9, 0.999, 1e-8, 0.1)


@pytest.fixture(scope="module")
def simulated():
    if build.compiler() is None:
        pytest.skip("no g++, which the executor needs to compile kernels for the CPU")
    build.load()
    return torch.ops.peft_kernels_simt


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def shifted(tensor, offset):
    """The same values, `offset` elements behind an address that allows vectors."""
    return torch.empty(tensor.numel() + offset, dtype=tensor.dtype)[offset:].view(tensor.shape).copy_(tensor)


@EACH_DTYPE
@EACH_CHOICE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gathered_columns_are_copies(simulated, dtype, chosen, layout):
    x, indices = laid_out(normal(7, WIDTH, dtype=dtype), layout), torch.tensor(chosen)
    assert_same_bits(simulated.gather_columns(x, indices), x[:, indices])


@EACH_DTYPE
@EACH_CHOICE
@DIM
@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_slices_are_written_at_every_alignment(simulated, dtype, chosen, dim, offset):
    shape = (9, WIDTH) if dim == 1 else (WIDTH, 9)
    indices, before = torch.tensor(chosen), shifted(normal(*shape, dtype=dtype), offset)
    for values_dtype in (dtype, torch.float32):
        values = normal(*before.index_select(dim, indices).shape, dtype=values_dtype)
        weight = shifted(before, offset)
        simulated.slice_write_(weight, indices, values, dim)
        expected = before.clone()
        reference.slice_write_(expected, indices, values, dim)
        assert_same_bits(weight, expected)


@EACH_DTYPE
@EACH_CHOICE
@DIM
@pytest.mark.parametrize("offset", [0, 1])
def test_slices_are_exchanged_at_every_alignment(simulated, dtype, chosen, dim, offset):
    shape = (9, WIDTH) if dim == 1 else (WIDTH, 9)
    indices, before = torch.tensor(chosen), normal(*shape, dtype=dtype)
    for seed, other in enumerate(CHANNELS.values()):
        build.set_seed(seed)
        held_indices = torch.tensor(other)
        held = normal(*before.index_select(dim, held_indices).shape, dtype=dtype)
        change = normal(*before.index_select(dim, indices).shape)
        runs = []
        for kernel in (simulated.slice_exchange_, reference.slice_exchange_):
            weight, original = (shifted(tensor, offset) for tensor in (before, torch.zeros_like(change, dtype=dtype)))
            kernel(weight, held_indices, shifted(held, offset), indices, shifted(change, offset), original, dim)
            runs.append((weight, original))
        for actual, expected in zip(*runs, strict=True):
            assert_same_bits(actual, expected)


def state_of(weight, indices, dim, values_dtype):
    trainable = weight.index_select(dim, indices).to(values_dtype)
    state = [normal(*trainable.shape, dtype=values_dtype) for _ in range(3)]
    return [trainable, *state[:2], state[2].abs()]


@EACH_DTYPE
@DIM
@pytest.mark.parametrize("values_dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("columns", [23, 64])
def test_adamw_is_that_of_sparse_deltas_and_the_write_that_of_slices(simulated, dtype, dim, values_dtype, columns):
    weight, indices = normal(33, columns, dtype=dtype), torch.tensor([0, 2, 3, 4, 5, 11, 22])
    state = state_of(weight, indices, dim, values_dtype)
    flat = [tensor.flatten().clone() for tensor in state]
    simulated.sparse_adamw_(*flat, None, None, None, *ADAMW)
    expected = weight.clone()
    simulated.slice_write_(expected, indices, flat[0].view(state[0].shape), dim)
    for seed in (0, 1):
        build.set_seed(seed)
        ours, written = [tensor.clone() for tensor in state], weight.clone()
        simulated.slice_adamw_(*ours, written, indices, dim, *ADAMW)
        for actual, same in zip(ours, flat, strict=True):
            assert_same_bits(actual.flatten(), same)
        assert_same_bits(written, expected, "weight")


@EACH_DTYPE
@pytest.mark.parametrize("columns", [1, 3, 4, 7, 8, 9, 16, 17, 31, 96, 261])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 9])
def test_swiglu_at_the_edges_of_chunks_and_groups_of_rows(simulated, dtype, columns, rows):
    gate, up, grad_h = (normal(rows, columns, dtype=dtype) for _ in range(3))
    indices = torch.randperm(columns)[: (columns + 2) // 3].sort().values
    h, kept = simulated.swiglu(gate, up, indices)
    exact, _ = reference.swiglu(gate.double(), up.double(), indices)
    assert_accurate(h, reference.swiglu(gate, up, indices)[0], exact, "h")
    assert_same_bits(kept, h[:, indices])
    own = reference.swiglu_backward(grad_h, gate, up)
    wide = reference.swiglu_backward(*(tensor.double() for tensor in (grad_h, gate, up)))
    for name, *results in zip(("gate", "up"), simulated.swiglu_backward(grad_h, gate, up), own, wide, strict=True):
        assert_accurate(*results, f"gradient of {name}")


@EACH_DTYPE
@EACH_CHOICE
def test_swiglu_keeps_any_channels(simulated, dtype, chosen):
    gate, up, indices = normal(6, WIDTH, dtype=dtype), normal(6, WIDTH, dtype=dtype), torch.tensor(chosen)
    h, kept = simulated.swiglu(gate, up, indices)
    assert_same_bits(h, simulated.swiglu(gate, up, indices[:0])[0])
    assert_same_bits(kept, h[:, indices])


@EACH_DTYPE
def test_any_order_of_blocks_warps_and_lanes_gives_the_same_bits(simulated, dtype):
    tensors = [normal(20, 700, dtype=dtype) for _ in range(3)]
    indices = torch.randperm(700)[:90].sort().values
    runs = []
    for seed in range(3):
        build.set_seed(seed)
        runs.append(
            [
                simulated.gather_columns(tensors[0], indices),
                *simulated.swiglu(*tensors[:2], indices),
                *simulated.swiglu_backward(*tensors),
            ]
        )
    for run in runs[1:]:
        for actual, expected in zip(run, runs[0], strict=True):
            assert_same_bits(actual, expected)


def test_float64_is_refused(simulated):
    x, indices = torch.zeros(3, 4, dtype=torch.float64), torch.tensor([1])
    with pytest.raises(RuntimeError, match="gather_columns: x must be float32, bfloat16 or float16, got float64"):
        simulated.gather_columns(x, indices)
    with pytest.raises(RuntimeError, match="slice_write_: weight must be float32, bfloat16 or float16, got float64"):
        simulated.slice_write_(x, indices, x[:, :1], 1)
    with pytest.raises(RuntimeError, match="slice_exchange_: weight must be float32, bfloat16 or float16, got float64"):
        simulated.slice_exchange_(x, None, None, indices, x[:, :1], x[:, :1], 1)
    with pytest.raises(RuntimeError, match="swiglu: gate must be float32, bfloat16 or float16, got float64"):
        simulated.swiglu(x, x, indices)
