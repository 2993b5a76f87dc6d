"""Dropout masks: the published Philox answers, the documented layout, the same bits everywhere, honest statistics."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.ops.lora import draw_rng_state
from peft_kernels.reference.philox import dropout_mask, dropout_scale, dropout_threshold, philox_4x32_10

from ..support import philox
from ..support.places import devices, marks_of, places

EVERYWHERE = pytest.mark.parametrize("place", places("dropout_mask"))
SEEDS = [(0, 0), (1, 0), (0, 1), (-1, -1), (2**63 - 1, -(2**63)), (-(2**63), 2**63 - 1), (2**32, 2**32 + 7)]


def mask(place, rows, columns, dropout_p, seed=5, offset=9):
    state = torch.tensor([seed, offset], dtype=torch.int64, device=place.device)
    result = place.kernel("dropout_mask", torch.float32)(rows, columns, dropout_p, state)
    assert result.dtype == torch.bool
    assert result.shape == (rows, columns)
    return result.cpu()


@pytest.mark.parametrize(("counter", "key", "expected"), philox.KNOWN_ANSWERS)
def test_reference_gives_the_answers_of_random123(counter, key, expected):
    def words(numbers):
        return tuple(torch.tensor(number, dtype=torch.int64) for number in numbers)

    assert tuple(word.item() for word in philox_4x32_10(words(counter), words(key))) == expected


@EVERYWHERE
@pytest.mark.parametrize(("seed", "offset"), SEEDS)
def test_mask_follows_the_documented_layout(place, seed, offset):
    expected = philox.keep_mask(6, 37, 0.4, seed, offset)
    assert torch.equal(mask(place, 6, 37, 0.4, seed, offset), expected)


@EVERYWHERE
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1000])
@pytest.mark.parametrize("dropout_p", [0.05, 0.5])
def test_mask_is_the_same_bits_on_every_backend(place, columns, dropout_p):
    state = torch.tensor([-(2**62) + 3, 2**61 + 11], dtype=torch.int64)
    expected = dropout_mask(70, columns, dropout_p, state)
    assert torch.equal(mask(place, 70, columns, dropout_p, -(2**62) + 3, 2**61 + 11), expected)


@EVERYWHERE
def test_mask_of_many_rows_is_the_same_bits_on_every_backend(place):
    expected = dropout_mask(3000, 24, 0.3, torch.tensor([5, 9]))
    assert torch.equal(mask(place, 3000, 24, 0.3), expected)


@EVERYWHERE
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_mask_of_nothing_is_empty(place, shape):
    assert mask(place, *shape, 0.5).numel() == 0


@EVERYWHERE
def test_mask_keeps_all_at_p_0_and_nothing_at_p_1(place):
    assert mask(place, 50, 100, 0.0).all()
    assert not mask(place, 50, 100, 1.0).any()


@EVERYWHERE
def test_probabilities_are_honored_in_steps_of_two_to_the_minus_16(place):
    assert mask(place, 200, 1000, 2.0**-18).all()
    assert torch.equal(mask(place, 60, 200, 0.25 + 2.0**-18), mask(place, 60, 200, 0.25))
    assert not mask(place, 60, 200, 1 - 2.0**-18).any()


@EVERYWHERE
def test_smallest_step_drops_what_it_should(place):
    # A million draws at 2**-16: 15 expected, standard deviation 4.
    dropped = (~mask(place, 1000, 1000, 2.0**-16)).sum().item()
    assert 0 < dropped < 15 + 5 * 4


@EVERYWHERE
def test_a_larger_probability_drops_more_of_the_same_elements(place):
    small, large = mask(place, 40, 50, 0.2), mask(place, 40, 50, 0.6)
    assert torch.equal(small & large, large)
    assert not torch.equal(small, large)


@EVERYWHERE
def test_mask_does_not_depend_on_the_number_of_rows_or_columns(place):
    whole = mask(place, 40, 50, 0.5)
    assert torch.equal(mask(place, 11, 50, 0.5), whole[:11])
    assert torch.equal(mask(place, 40, 13, 0.5), whole[:, :13])


@EVERYWHERE
@pytest.mark.parametrize("dropout_p", [0.05, 0.1, 0.5, 0.9])
def test_drop_rate_is_the_probability(place, dropout_p):
    kept = mask(place, 600, 600, dropout_p).double()
    deviation = (dropout_p * (1 - dropout_p)) ** 0.5
    assert abs(kept.mean() - (1 - dropout_p)) < 5 * deviation / 600
    assert (kept.mean(0) - (1 - dropout_p)).abs().max() < 6 * deviation / 600**0.5
    assert (kept.mean(1) - (1 - dropout_p)).abs().max() < 6 * deviation / 600**0.5


def correlation(left, right):
    left, right = left.double().flatten(), right.double().flatten()
    return torch.corrcoef(torch.stack([left, right]))[0, 1].abs().item()


@EVERYWHERE
def test_neighboring_rows_columns_and_groups_are_independent(place):
    kept = mask(place, 401, 408, 0.5)
    for left, right in [
        (kept[1:], kept[:-1]),
        (kept[:, 1:], kept[:, :-1]),
        (kept[:, 8:], kept[:, :-8]),
        (kept[8:, 8:], kept[:-8, :-8]),
    ]:
        assert correlation(left, right) < 5 / 390


@EVERYWHERE
@pytest.mark.parametrize("other", [(6, 9), (5, 10), (9, 5), (5 + 2**32, 9), (5, 9 + 2**32), (-5, 9), (5, -9)])
def test_every_bit_of_seed_and_offset_gives_an_independent_mask(place, other):
    first, second = mask(place, 200, 200, 0.5), mask(place, 200, 200, 0.5, *other)
    assert correlation(first, second) < 5 / 200


@pytest.mark.parametrize(("dropout_p", "threshold"), [(0.0, 0), (0.5, 32768), (1.0, 65536), (2.0**-16, 1)])
def test_threshold_is_the_probability_in_units_of_two_to_the_minus_16(dropout_p, threshold):
    assert dropout_threshold(dropout_p) == threshold


@pytest.mark.parametrize(("dropout_p", "scale"), [(0.0, 1.0), (0.5, 2.0), (0.75, 4.0), (1.0, 0.0)])
def test_kept_elements_are_scaled_to_keep_the_mean(dropout_p, scale):
    assert dropout_scale(dropout_p) == scale


@pytest.mark.parametrize("device", [pytest.param(name, marks=marks_of(name)) for name in devices()])
def test_seed_and_offset_are_drawn_from_all_64_bit_numbers(device):
    states = torch.stack([draw_rng_state(torch.device(device)) for _ in range(200)]).cpu()
    assert states.dtype == torch.int64
    bits = (states[..., None] >> torch.arange(64)) & 1
    share = bits.double().mean(0)
    # 200 fair coins: half, with a standard deviation of 0.035.
    assert share.min() > 0.25
    assert share.max() < 0.75
