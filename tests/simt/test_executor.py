"""The executor computes what the hardware would: every intrinsic and PTX wrapper against a plain model of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from . import build

SEEDS = range(4)
LANES = torch.arange(32)


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def shuffled(value: Tensor, source: Tensor) -> Tensor:
    """What lanes get that read from lanes `source`; negative: their own."""
    return value[torch.where(source < 0, LANES, source)]


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
def test_shuffles(cases, width):
    value, out = torch.randn(32), torch.zeros(6, 32)
    cases.shuffles(value, out, width)
    first = LANES // width * width
    inside = lambda source: torch.where((source >= first) & (source < first + width), source, -1)  # noqa: E731
    assert torch.equal(out[0], value[first + (LANES * 3 + 1) % width])
    assert torch.equal(out[1], shuffled(value, inside(LANES - 3)))
    assert torch.equal(out[2], shuffled(value, inside(LANES + 3)))
    # An xor may reach into earlier segments, not into later ones.
    crossing = LANES ^ 5
    assert torch.equal(out[3], shuffled(value, torch.where(crossing < first + width, crossing, -1)))
    assert torch.equal(out[4], value[LANES ^ 1])
    assert torch.equal(out[5], (LANES ^ 1).float())


def signed(word: int) -> int:
    """A 32-bit word as int32 has it."""
    return word - 2**32 if word >= 2**31 else word


def test_votes_matches_and_reductions(cases):
    value, out = torch.randint(0, 6, (32,), dtype=torch.int32), ints(10, 32)
    cases.votes(value, out, 0)
    values = value.tolist()
    xor = 0
    for one in values:
        xor ^= one
    assert out[0].unique().tolist() == [signed(sum(1 << lane for lane in range(32) if values[lane] > 2))]
    assert out[1].tolist() == [0] * 32 and out[2].tolist() == [1] * 32
    assert out[3].tolist() == [signed(sum(1 << i for i in range(32) if values[i] == one)) for one in values]
    assert out[4].tolist() == [0] * 32  # the lanes differ
    assert out[5].tolist() == [0] * 32  # all ones, which is -1, plus the predicate
    assert out[6].unique().tolist() == [sum(values)]
    assert out[7].unique().tolist() == [(min(values) - 3) * 100 + max(values) - 3]
    assert out[8].unique().tolist() == [xor]
    assert out[9].tolist() == [sum(values[:16])] * 16 + [sum(values[16:])] * 16


def test_active_masks_hold_who_came_along(cases):
    out = ints(2, 32)
    cases.active_masks(ints(1), out, 0)
    together = [lane for lane in range(32) if lane % 3 == 0]
    assert out[0].tolist() == [signed(sum(1 << i for i in together)) if lane % 3 == 0 else -1 for lane in range(32)]
    assert out[1].tolist() == [0 if lane % 3 == 0 else -1 for lane in range(32)]


def test_votes_of_a_block_and_its_size(cases):
    out = ints(4, 96)
    cases.block_votes(ints(1), out, 0)
    assert [row.unique().tolist() for row in out] == [[32], [1], [0], [96100]]


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics(cases, seed):
    build.set_seed(seed)
    out = ints(11)
    out[4] = -1
    cases.atomics(ints(1), out, 0)
    assert out[:5].tolist() == [255 * 128, 255, -255, 2**31 - 1, -(2**31)]
    assert 1 <= out[5] <= 256 and out[6] == 1 and out[7] == 256
    assert out[8:10].view(torch.int64).item() == 256 * 2**31
    assert out[10:].view(torch.float32).item() == 128.0


def turns(cases, seed: int) -> tuple[list[int], list[int]]:
    build.set_seed(seed)
    out = ints(100)
    cases.turns(ints(1), out, 0)
    return out[1:17].tolist(), out[18:82].tolist()


def test_the_seed_decides_the_order_of_blocks_and_threads(cases):
    blocks, threads = zip(*(turns(cases, seed) for seed in (0, 1, 0)), strict=True)
    assert sorted(blocks[0]) == list(range(16)) and sorted(threads[0]) == list(range(64))
    assert blocks[0] != blocks[1] and threads[0] != threads[1]
    assert blocks[0] == blocks[2] and threads[0] == threads[2]


@pytest.mark.parametrize("seed", SEEDS)
def test_sums_through_shared_memory(cases, seed):
    build.set_seed(seed)
    values, out = torch.randint(-8, 8, (3, 128)).float(), torch.zeros(3)
    cases.block_sums(values, out, 0)
    assert torch.equal(out, values.sum(1))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("length", [7 * 128, 6 * 128 + 4 * 5 + 3, 1])
def test_copies_in_groups(cases, seed, length):
    build.set_seed(seed)
    values, out = torch.randn(length), torch.full((7, 128), 9.0)
    cases.copy_pipeline(values, out, 0)
    assert torch.equal(out.flatten(), torch.cat([values, torch.zeros(7 * 128 - length)]))


def fragments(matrix: Tensor, transposed: bool) -> Tensor:
    """Registers `[32, 2]` of 16-bit elements of an 8 x 8 matrix: lane 4 i + j has elements 2 j and 2 j + 1 of row i."""
    return (matrix.T if transposed else matrix).reshape(32, 2)


@pytest.mark.parametrize("count", [4, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_loads(cases, count, transposed):
    matrices = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    out = ints(32, 4)
    cases.matrix_loads(matrices, out, int(transposed) + (0 if count == 4 else 2))
    for i in range(count):
        assert torch.equal(out[:, i].clone().view(torch.int16).reshape(32, 2), fragments(matrices[i], transposed))


def halves(matrix: Tensor) -> Tensor:
    """`[rows, columns]` of 16-bit elements as `[rows, columns / 2]` words."""
    return matrix.contiguous().view(torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_matrix_products(cases, dtype):
    # The layouts as the PTX manual draws them: quadrants of 8 rows, 4 lanes to a row.
    depth = 8 if dtype == torch.float32 else 16
    left, right, sums = torch.randn(16, depth).to(dtype), torch.randn(depth, 8).to(dtype), torch.randn(16, 8)
    if dtype == torch.float32:
        # Random low bits, which tf32 does not look at.
        words, words_right = left.view(torch.int32), right.T.contiguous().view(torch.int32)
        left, right = (words & ~0x1FFF).view(torch.float32), (words_right & ~0x1FFF).view(torch.float32).T
    else:
        words, words_right = halves(left), halves(right.T)
    lefts = torch.stack([words[:8, :4], words[8:, :4], words[:8, 4:], words[8:, 4:]], -1).reshape(32, 4)
    rights = torch.stack([words_right[:, :4], words_right[:, 4:]], -1).reshape(32, 2)
    pairs = torch.stack([sums[:8].reshape(8, 4, 2), sums[8:].reshape(8, 4, 2)], 2).reshape(32, 4).contiguous()
    variant = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}[dtype]
    cases.matrix_products(torch.cat([lefts.flatten(), rights.flatten()]), pairs, variant)
    result = pairs.reshape(8, 4, 2, 2).permute(2, 0, 1, 3).reshape(16, 8)
    torch.testing.assert_close(result.double(), sums.double() + left.double() @ right.double(), rtol=0, atol=4e-6)


def test_bit_functions(cases):
    out = ints(8)
    cases.bit_functions(ints(1) + 2, out, 0)
    assert out.tolist() == [864, 531, 0x60000000, 3, 0x3F800000, 3, 15, 3]


def test_a_launch_that_no_gpu_would_start_is_refused(cases):
    with pytest.raises(RuntimeError, match=r"invalid launch configuration, grid 0 x 1 x 1 of 32 threads"):
        cases.empty_grid(torch.zeros(0), torch.zeros(0), 0)
