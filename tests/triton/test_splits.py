"""Sums that are cut over programs: every element once, always in the same order."""

from __future__ import annotations

import pytest
import torch
from peft_kernels.triton_kernels import common, lora

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.operators import formula, random_call, result_dtypes

SHAPES = {
    "lora_shrink": {"rows": 5, "columns": 1100, "rank": 3},
    "lora_factor_grad": {"rows": 1100, "columns": 9, "rank": 3},
    "lora_grad_b": {"rows": 1100, "out_columns": 300, "rank": 3},
}
"""Shapes that every one of these operators cuts, with ragged ends."""


@pytest.mark.parametrize("operator", SHAPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_cut_sums_are_accurate_and_the_same_on_every_run(operator, dropout_p, place, dtype, launched):
    call = random_call(operator, **SHAPES[operator], dropout_p=dropout_p, dtype=dtype, device=place.device)
    first, second = call.run(lora.LAUNCHERS[operator]), call.run(lora.LAUNCHERS[operator])
    assert "sum_partials_kernel" in [name for name, _ in launched]
    assert all(grid[1] > 1 for name, grid in launched if name != "sum_partials_kernel")
    for left, right in zip(first, second, strict=True):
        assert_same_bits(left, right)
    exact, own = formula(call, torch.float64), formula(call, dtype)
    for index, actual in enumerate(first):
        assert actual.dtype == result_dtypes(call)[index]
        assert_accurate(actual, own[index], exact[index], f"{operator} result {index}")


@pytest.mark.parametrize("operator", SHAPES)
def test_integers_give_exact_sums(operator, place, dtype):
    call = random_call(operator, **SHAPES[operator], integers=True, dtype=dtype, device=place.device)
    results = call.run(lora.LAUNCHERS[operator])
    for actual, exact, promised in zip(results, formula(call, torch.float64), result_dtypes(call), strict=True):
        assert_same_bits(actual, exact.to(promised) + 0.0)


def test_ranks_beyond_one_tile_take_several(place, dtype, launched):
    call = random_call("lora_shrink", rows=3, columns=20, rank=200, dtype=dtype, device=place.device)
    call.run(lora.LAUNCHERS["lora_shrink"])
    assert [grid[2] for _, grid in launched] == [2 if dtype.itemsize == 2 else 4]


@pytest.mark.parametrize(("rank", "kernels"), [(16, {"grad_b_kernel"}), (33, {"shrink_kernel", "factor_grad_kernel"})])
def test_grad_b_reads_dy_once_where_ranks_are_small(rank, kernels, place, dtype, launched):
    call = random_call("lora_grad_b", rank=rank, dtype=dtype, device=place.device)
    call.run(lora.LAUNCHERS["lora_grad_b"])
    assert {name for name, _ in launched} == kernels


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 7, 8, 100, 1001])
@pytest.mark.parametrize("parts", [-1, 0, 1, 2, 3, 7, 64, 2000])
def test_chunks_cover_every_step_once(steps, parts):
    length, count = common.even_chunks(steps, parts)
    assert 1 <= count <= max(1, parts)
    chunks = [range(steps)[part * length : (part + 1) * length] for part in range(count)]
    assert [step for chunk in chunks for step in chunk] == list(range(steps))
    assert steps == 0 or all(chunks)


def test_splits_do_not_depend_on_the_device():
    tile = lora.Tile(64, 64, num_warps=4, num_stages=3)
    assert tile.splits(programs=128, steps=64) == (16, 4)
    assert tile.splits(programs=10_000, steps=64) == (64, 1)
    assert tile.splits(programs=1, steps=7) == (7, 1)


@pytest.mark.parametrize(("size", "width"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (128, 128), (999, 128)])
def test_ranks_are_padded_to_powers_of_two(size, width):
    assert common.padded(size, 16, 128) == width


@pytest.mark.parametrize("splits", [1, 7, 8, 9, 20])
def test_partial_sums_of_any_number_add_up(splits, place):
    partial = torch.randint(-9, 9, (splits, 3, 401), device=place.device).float()
    out = torch.empty(3, 401, dtype=torch.float16, device=place.device)
    common.sum_partials(partial, out)
    assert torch.equal(out, partial.sum(0).half())
