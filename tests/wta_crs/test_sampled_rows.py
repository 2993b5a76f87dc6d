"""`sampled_rows`: the rows and scales of the definition, unbiased to the last digit, with no more variance than CRS."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_kernels import backends, ops

from ..support.layouts import LAYOUTS, laid_out
from .definition import certain_rows, expected_sample, sampled_grad

# The largest is a power of two, so that norms are whole numbers of the units that probabilities are counted in.
NORMS = {
    "even": [4] * 9,
    "one large": [64, 1, 2, 3, 1, 1, 2, 5],
    "several large": [64, 1, 50, 2, 3, 33, 1, 1, 2, 5, 20, 1],
    "falling": [16, 15, 13, 12, 11, 9, 8, 7, 5, 4, 3, 2],
    "with zeros": [0, 8, 0, 3, 0, 2, 1, 0, 0],
    "few that count": [0, 0, 8, 0, 0, 5, 0],
}
EACH = pytest.mark.parametrize("norms", NORMS.values(), ids=NORMS)


def sampled(norms, uniforms):
    uniforms = torch.as_tensor(uniforms, dtype=torch.float64)
    return ops.sampled_rows(torch.as_tensor(norms, dtype=torch.float64), len(uniforms), uniforms)


def variance(samples, factors):
    """`E |G|^2 - |E G|^2` of G, the sum over independent draws of `scale f_row`.

    samples: of each draw a list of (probability, row, scale); factors `[M, ...]`.
    """
    total = 0.0
    for draw in samples:
        values = torch.stack([scale * factors[row] for _, row, scale in draw])
        weights = torch.tensor([probability for probability, _, _ in draw], dtype=values.dtype)
        mean = torch.tensordot(weights, values, 1)
        total += float((weights * values.flatten(1).square().sum(1)).sum() - mean.square().sum())
    return total


@EACH
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_rows_and_scales_are_those_of_the_definition(norms, k):
    for _ in range(4):
        # Sixteenths: on the borders of rows, too, where the later row is taken.
        uniforms = (torch.randint(0, 16, (k,)) / 16).tolist()
        rows, scales = sampled(norms, uniforms)
        expected_rows, expected_scales = (
            expected_sample(norms, uniforms) if sum(n > 0 for n in norms) >= k else (None, None)
        )
        assert rows.dtype == torch.int32 and scales.dtype == torch.float32
        assert rows.shape == scales.shape == (k,)
        if expected_rows is None:  # all that count are certain, and what is left is drawn for nothing
            assert {row for row, scale in zip(rows.tolist(), scales.tolist(), strict=True) if scale} == {
                row for row, norm in enumerate(norms) if norm
            }
            assert set(scales.tolist()) == {0.0, 1.0}
            continue
        assert rows.tolist() == expected_rows
        assert scales.tolist() == [torch.tensor(float(scale)).item() for scale in expected_scales]


@EACH
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_every_row_counts_once_in_expectation(norms, k):
    # The mean over all numbers is a sum over a grid, whose cells no border between rows divides.
    cells = sum(norms[i] for i in range(len(norms)) if i not in certain_rows(norms, k)) or 1
    mean = torch.zeros(len(norms), dtype=torch.float64)
    for cell in range(cells):
        rows, scales = sampled(norms, [(cell + 0.5) / cells] * k)
        mean.index_add_(0, rows.long(), scales.double() / cells)
    expected = torch.tensor([float(norm > 0) for norm in norms], dtype=torch.float64)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6)  # scales are rounded to float32


@EACH
@pytest.mark.parametrize("k", [2, 4, 6])
def test_variance_is_at_most_that_of_independent_draws(norms, k):
    # Probabilities of the authors: |x_i| |dy_i|.
    factors = torch.randn(len(norms), 3, 4, dtype=torch.float64)
    factors = factors / factors.flatten(1).norm(dim=1)[:, None, None] * torch.tensor(norms)[:, None, None]
    total, certain = sum(norms), certain_rows(norms, k)
    rest = total - sum(norms[i] for i in certain)
    cells = rest or 1
    by_slot = [sampled(norms, [(cell + 0.5) / cells] * k) for cell in range(cells)]
    ours = [
        [(1 / cells, int(rows[slot]), float(scales[slot])) for rows, scales in by_slot]
        for slot in range(len(certain), k)
    ]
    draws = k - len(certain)
    others = [i for i, norm in enumerate(norms) if norm and i not in certain]
    independent = [[(norms[i] / rest, i, rest / (draws * norms[i])) for i in others]] * draws if others else []
    plain = [[(norm / total, i, total / (k * norm)) for i, norm in enumerate(norms) if norm]] * k
    allowed = 1e-5 * sum(norms) ** 2
    assert variance(ours, factors) <= variance(independent, factors) + allowed
    assert variance(independent, factors) <= variance(plain, factors) + allowed
    if certain:
        assert variance(ours, factors) < 0.9 * variance(plain, factors)


@pytest.mark.parametrize("dtype", backends.DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_strides_or_threads(dtype, layout):
    norms, uniforms = torch.rand(3000).to(dtype), torch.rand(700, dtype=torch.float64)
    expected = ops.sampled_rows(norms, 700, uniforms)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        found = ops.sampled_rows(laid_out(norms, layout), 700, uniforms)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("extreme", [0.0, 1.0 - 2.0**-53])
@pytest.mark.parametrize("spread", [0.0, 3.0, 60.0])
def test_rows_are_in_range_whatever_the_numbers(extreme, spread):
    norms = (torch.randn(501, dtype=torch.float64) * spread).exp()
    for k in (1, 2, 250, 500):
        rows, scales = ops.sampled_rows(norms, k, torch.full((k,), extreme, dtype=torch.float64))
        assert rows.min() >= 0 and rows.max() < 501
        assert scales.isfinite().all() and (scales >= 1.0 - 1e-6).all()


def test_a_row_of_small_norm_can_be_drawn():
    # Of the second part, far smaller than the smallest unit, the last number points at the last row.
    rows, scales = sampled([1.0, 1.0, 1e-30], [0.5, 1.0 - 2.0**-53])
    assert rows.tolist() == [0, 2]
    assert scales[1].item() == pytest.approx(2.0**31, rel=1e-6)


def test_rows_that_do_not_count_are_never_taken_with_a_scale():
    rows, scales = sampled([0.0, -1.0, 0.0, 0.0], [0.1, 0.9])
    assert scales.tolist() == [0.0, 0.0] and rows.min() >= 0 and rows.max() < 4


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_makes_scales_nan(wrong):
    rows, scales = sampled([1.0, wrong, 2.0, 1.0], [0.5, 0.5])
    assert scales.isnan().all() and rows.min() >= 0 and rows.max() < 4


@pytest.mark.parametrize("total", [0, 1, 3])
def test_more_rows_than_there_are_keep_all(total):
    for k in (max(total, 1), total + 4):
        rows, scales = ops.sampled_rows(torch.zeros(total), k)
        assert rows.tolist() == list(range(total)) and rows.dtype == torch.int32
        assert scales.tolist() == [1.0] * total


def test_a_seed_or_a_generator_decides():
    norms = torch.rand(400)
    torch.manual_seed(1)
    first, second = ops.sampled_rows(norms, 100), ops.sampled_rows(norms, 100)
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(1)
    assert torch.equal(ops.sampled_rows(norms, 100)[0], first[0])
    state = torch.get_rng_state()
    own = [ops.sampled_rows(norms, 100, generator=torch.Generator().manual_seed(9))[0] for _ in range(2)]
    assert torch.equal(*own) and torch.equal(torch.get_rng_state(), state)


def test_nothing_waits_for_the_device():
    with FakeTensorMode():  # raises where a value would be read
        rows, scales = ops.sampled_rows(torch.rand(64), 20)
        sample = ops.draw_rows(torch.rand(8, 8, 5), 0.3)
    assert rows.shape == scales.shape == sample.rows.shape == (20,)
    assert sample.kept.shape == (20, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("total", "k"), [(9, 4), (0, 3), (3, 5)])
def test_opcheck(dtype, total, k):
    arguments = (torch.rand(total).to(dtype), torch.rand(k, dtype=torch.float64))
    torch.library.opcheck(torch.ops.peft_kernels.sampled_rows.default, arguments)


NUMBERS = torch.rand(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 2.0}, TypeError, r"k must be an integer, got 2\.0"),
        ({"k": True}, TypeError, "k must be an integer, got True"),
        ({"norms": torch.rand(2, 2)}, ValueError, r"norms must be 1-D, got float32 \[2, 2\]"),
        ({"norms": torch.ones(4, dtype=torch.int32)}, TypeError, r"norms must be float32, .*, got int32 \[4\]"),
        ({"uniforms": NUMBERS.float()}, TypeError, r"uniforms must be float64, got float32 \[2\]"),
        ({"uniforms": NUMBERS[:1]}, ValueError, r"uniforms must be \[2\] on cpu, got float64 \[1\]"),
        ({"uniforms": NUMBERS.to("meta")}, ValueError, r"uniforms must be \[2\] on cpu, got float64 \[2\] on meta"),
        ({"generator": torch.Generator()}, ValueError, "generator must be None when uniforms are given"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = {"norms": torch.rand(4), "k": 2, "uniforms": NUMBERS, **change}
    with pytest.raises(error, match=f"sampled_rows: {message}"):
        ops.sampled_rows(**arguments)


@pytest.mark.parametrize("ratio", [0, 0.0, -0.5, 1.5, float("nan"), True, "all", None])
def test_ratios_out_of_range_are_refused(ratio):
    for refused in (lambda: ops.draw_rows(torch.rand(4, 2), ratio), lambda: ops.kept_rows(4, ratio)):
        with pytest.raises(ValueError, match=r"keep_ratio must be a number in \(0, 1\], got"):
            refused()


def test_how_many_rows_are_kept():
    assert [ops.kept_rows(total, 0.7) for total in (0, 1, 2, 10, 11)] == [0, 1, 2, 7, 8]
    assert ops.kept_rows(10**9, 1e-9) == 1 and ops.kept_rows(7, 1) == 7
    assert ops.draw_rows(torch.rand(2, 3), 0.9) is None and ops.draw_rows(torch.rand(0, 3), 0.5) is None


def test_the_sum_of_products_that_rows_and_scales_stand_for():
    x, dy = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    norms = x.norm(dim=1) * dy.norm(dim=1)
    estimates = torch.stack([sampled_grad(dy, x, *ops.sampled_rows(norms, 10)) for _ in range(600)])
    error = estimates.mean(0) - dy.t() @ x
    assert (error.abs() < 5 * estimates.std(0) / 600**0.5 + 1e-9).all()
