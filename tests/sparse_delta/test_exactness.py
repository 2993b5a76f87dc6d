"""Taking a delta away gives back the bits that were there, whatever was written in between."""

from __future__ import annotations

import pytest
import torch

from ..support.accuracy import assert_same_bits
from ..support.places import ALL_DTYPES, dtype_name, places_and_dtypes, serves
from ..support.sparse_delta import IN_PLACE, random_delta

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
EACH_PLACE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(*IN_PLACE))
INDICES = pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=dtype_name)
COUNTS = pytest.mark.parametrize("count", [0, 1, 511, 5000, 90_000])


@EACH_PLACE
@INDICES
@COUNTS
def test_restoring_gives_the_bits_back(place, dtype, index_dtype, count):
    delta = random_delta((300, 300), count, dtype=dtype, index_dtype=index_dtype, device=place.device)
    own = delta.copy()
    write = place.kernel("scatter_write_", dtype)
    write(own.weight, own.indices, own.original, own.values)
    place.kernel("scatter_accumulate_", dtype)(own.weight, own.indices, own.values, 3.3)
    state = (own.values, own.grad, own.exp_avg, own.exp_avg_sq)
    place.kernel("sparse_adamw_", dtype)(*state, own.weight, own.indices, own.original, 1, 0.1, 0.9, 0.999, 1e-8, 0.0)
    assert count == 0 or not torch.equal(own.weight, delta.weight)
    write(own.weight, own.indices, own.original, None)
    assert_same_bits(own.weight, delta.weight)


@EACH_PLACE
@INDICES
def test_any_bits_are_restored(place, dtype, index_dtype):
    # Infinities, NaNs with payloads, negative zeros and subnormal numbers, of which arithmetic would change some.
    size = torch.empty((), dtype=dtype).element_size()
    limits = torch.iinfo(BITS[size])
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(limits.min, limits.max, (40_000,), dtype=BITS[size], generator=generator)
    weight = bits.view(dtype).to(place.device)
    indices = torch.randperm(40_000, generator=generator)[:9_999].sort().values.to(index_dtype).to(place.device)
    original, before = weight[indices.long()], weight.clone()
    write = place.kernel("scatter_write_", dtype)
    write(weight, indices, original, torch.ones(9_999, device=place.device))
    write(weight, indices, original, None)
    assert_same_bits(weight, before)


@EACH_PLACE
def test_writing_twice_is_writing_once(place, dtype):
    # Absolute, not added: so no error grows over the steps of a training run.
    delta = random_delta(dtype=dtype, device=place.device)
    write = place.kernel("scatter_write_", dtype)
    once, often = delta.copy(), delta.copy()
    write(once.weight, delta.indices, delta.original, delta.values)
    for scale in (5.0, -2.0, 1.0):
        write(often.weight, delta.indices, delta.original, delta.values * scale)
    assert_same_bits(often.weight, once.weight)


@EACH_PLACE
@pytest.mark.parametrize("values_dtype", ALL_DTYPES, ids=dtype_name)
def test_sums_are_rounded_once(place, dtype, values_dtype):
    # Integers below 2^8 are exact in every dtype, so is each sum, and adding and subtracting are inverse.
    if not serves(place, IN_PLACE, values_dtype):
        pytest.skip(f"{place.backend} does not take float64")
    delta = random_delta((50, 51), 1000, dtype=dtype, values_dtype=values_dtype, device=place.device)
    delta = delta.map(lambda tensor: (tensor * 20).round())
    accumulate = place.kernel("scatter_accumulate_", dtype)
    weight = delta.weight.clone()
    accumulate(weight, delta.indices, delta.values, 1.0)
    added = delta.weight.double().view(-1).index_add(0, delta.indices.long(), delta.values.double())
    assert torch.equal(weight.double().view(-1), added)
    accumulate(weight, delta.indices, delta.values, -1.0)
    assert_same_bits(weight + 0.0, delta.weight + 0.0)


@EACH_PLACE
@pytest.mark.parametrize("scale", [1.0, 3e-3])
def test_a_small_delta_is_not_lost_in_the_dtype_of_the_weight(place, dtype, scale):
    # original + value rounded to the weight's dtype: half a unit at most from the sum, however small the value is.
    delta = random_delta((50, 51), 1000, dtype=dtype, device=place.device)
    values = delta.values * scale
    weight = delta.weight.clone()
    place.kernel("scatter_write_", dtype)(weight, delta.indices, delta.original, values)
    exact = delta.original.double() + values.double()
    error = (weight.view(-1)[delta.indices.long()].double() - exact).abs()
    limit = torch.finfo(dtype)
    assert bool((error <= 0.501 * limit.eps * exact.abs() + limit.smallest_normal * limit.eps).all())
