"""A weight of more than 2**31 elements: int64 positions, over a file that is a hole but for the touched pages."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft_kernels import ops
from peft_kernels.nn import SparseDeltaLinear
from peft_kernels.nn.positions import index_dtype, random_positions
from peft_kernels.optim import SparseAdamW

from ..support.accuracy import assert_same_bits
from ..support.places import places
from ..support.sparse_layer import LAYER_OPERATORS

COLUMNS = 2**15
ROWS = 2**16 + 3
NUMEL = ROWS * COLUMNS
POSITIONS = torch.tensor([0, 1, COLUMNS, 2**31 - 1, 2**31, 2**31 + 1, NUMEL - 2, NUMEL - 1])


@pytest.fixture
def large_weight(tmp_path):
    """`[ROWS, COLUMNS]` bfloat16, 4 GiB of zeros that nobody has to store."""
    path = tmp_path / "weight"
    with path.open("wb") as file:
        file.truncate(2 * NUMEL)
    if path.stat().st_blocks * 512 > 2**20:
        pytest.skip("this file system has no sparse files")
    weight = torch.from_file(str(path), shared=True, size=NUMEL, dtype=torch.bfloat16)
    weight[POSITIONS] = torch.arange(1.0, 9.0).bfloat16()
    yield weight.view(ROWS, COLUMNS)
    path.unlink()


def linear_over(weight):
    linear = nn.Linear(COLUMNS, ROWS, bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight)
    return linear


def test_positions_beyond_int32_need_int64():
    assert index_dtype(2**31) == torch.int32 and index_dtype(2**31 + 1) == torch.int64
    chosen = random_positions(2**33, 1000)
    assert chosen.dtype == torch.int64 and len(chosen) == 1000 and chosen[-1] > 2**32
    ops.check_indices(chosen, 2**33)


@pytest.mark.parametrize("place", places("scatter_write_", "sparse_adamw_", dtypes=(torch.bfloat16,)))
def test_operators_reach_every_element(place, large_weight):
    if place.device != "cpu":
        pytest.skip("the file is mapped into the CPU's memory")
    flat, original = large_weight.view(-1), torch.arange(1.0, 9.0).bfloat16()
    values = torch.arange(8.0) / 4 + 0.25
    place.kernel("scatter_write_", torch.bfloat16)(large_weight, POSITIONS, original, values)
    assert_same_bits(flat[POSITIONS], (original.float() + values).bfloat16())
    place.kernel("scatter_accumulate_", torch.bfloat16)(large_weight, POSITIONS, values, -1.0)
    assert_same_bits(flat[POSITIONS], original)
    state = [torch.zeros(8) for _ in range(2)]
    grad, before = torch.ones(8), values.clone()
    numbers = (1, 0.5, 0.9, 0.999, 1e-8, 0.0)
    place.kernel("sparse_adamw_", torch.bfloat16)(values, grad, *state, large_weight, POSITIONS, original, *numbers)
    torch.testing.assert_close(values, before - 0.5)
    assert_same_bits(flat[POSITIONS], (original.float() + values).bfloat16())
    place.kernel("scatter_write_", torch.bfloat16)(large_weight, POSITIONS, original, None)
    assert_same_bits(flat[POSITIONS], original)
    assert not flat[POSITIONS[4:6] + 2].any() and not flat[POSITIONS[6:] - 2**31].any(), "neighbors and wrapped ones"


@pytest.mark.parametrize("place", places(*LAYER_OPERATORS))
def test_the_sampled_gradient_reaches_every_element(place):
    if place.backend == "reference":
        pytest.skip("the reference makes the dense gradient, 8 GiB")
    x = torch.randn(3, COLUMNS, device=place.device)
    grad_out = torch.randn(3, ROWS, device=place.device)
    indices = POSITIONS.to(place.device)
    found = place.kernel("sampled_product", torch.float32)(grad_out, x, indices, torch.float32)
    expected = (grad_out[:, indices // COLUMNS] * x[:, indices % COLUMNS]).sum(0)
    torch.testing.assert_close(found, expected)


def test_a_layer_writes_moves_restores_and_loads(large_weight):
    layer = SparseDeltaLinear.from_linear(linear_over(large_weight), indices=POSITIONS)
    flat, original = large_weight.view(-1), torch.arange(1.0, 9.0).bfloat16()
    assert layer.indices.dtype == torch.int64
    assert_same_bits(layer.original, original)
    layer.values.grad = torch.ones(8)
    optimizer = SparseAdamW([layer.values], lr=0.5)
    optimizer.step()
    assert_same_bits(flat[POSITIONS], (original.float() + layer.values.detach()).bfloat16())
    layer.restore_weight()
    assert_same_bits(flat[POSITIONS], original)
    layer.merge()
    assert_same_bits(flat[POSITIONS], (original.float() + layer.values.detach()).bfloat16())
    layer.unmerge()
    layer.set_delta(POSITIONS - torch.tensor([0, 0, 1, 1, 0, 0, 0, 0]), torch.ones(8))
    layer.write()
    assert_same_bits(flat[POSITIONS[2:4]], original[2:4])
    assert flat[2**31 - 2] == 1.0 and flat[NUMEL - 1] == 9.0
    assert layer.to_linear(merge=False).weight is layer.weight
    assert_same_bits(flat[POSITIONS], original)
    state = {name: copy.deepcopy(layer.state_dict()[name]) for name in ("values", "indices")}
    with pytest.raises(RuntimeError, match=rf"indices must be in \[0, {NUMEL}\), got {NUMEL} at position 7"):
        layer.load_state_dict({**state, "indices": POSITIONS + (POSITIONS == NUMEL - 1)}, strict=False)
    layer.load_state_dict({**state, "indices": POSITIONS}, strict=False)
    layer.write()
    assert_same_bits(flat[POSITIONS], (original.float() + 1.0).bfloat16())


def test_int32_positions_are_widened():
    linear = nn.Linear(COLUMNS, ROWS, bias=False, device="meta", dtype=torch.bfloat16)
    linear.weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16).expand(ROWS, COLUMNS))
    with pytest.raises(TypeError, match="its weight is not contiguous"):
        SparseDeltaLinear.from_linear(linear, num_deltas=5)
    meta = nn.Linear(COLUMNS, ROWS, bias=False, device="meta", dtype=torch.bfloat16)
    layer = SparseDeltaLinear.from_linear(meta, indices=torch.tensor([0, 2**31 - 1], dtype=torch.int32))
    assert layer.indices.dtype == torch.int64 and layer.indices.is_meta
    assert SparseDeltaLinear.from_linear(meta, num_deltas=5).indices.shape == (5,)
