"""`slice_exchange_`: one slice for another in one pass, by whatever the two have in common, on every backend."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.reference import s2ft as reference

from ..support.accuracy import assert_same_bits
from ..support.layouts import laid_out
from ..support.places import ALL_DTYPES, dtype_name, operators_at_places, serves
from ..support.s2ft import random_channels

EACH = pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(("slice_exchange_",)))
ON_THE_CPU = pytest.mark.parametrize(
    ("operator", "place", "dtype"), operators_at_places(("slice_exchange_",), backend="cpu")
)
DIM = pytest.mark.parametrize("dim", [0, 1])
CHANGE = pytest.mark.parametrize("change_dtype", ALL_DTYPES, ids=dtype_name)
SHAPE = (67, 71)
# Which channels are held, and which come.
CHANNELS = {
    "nothing held": (None, (0, 3, 4, 30, 66)),
    "none held": ((), (0, 3, 4, 30, 66)),
    "none come": ((1, 2, 66), ()),
    "neither": ((), ()),
    "disjoint": ((1, 2, 5, 31), (0, 3, 4, 30, 66)),
    "overlapping": ((0, 4, 31, 65, 66), (0, 3, 4, 30, 66)),
    "equal": ((0, 3, 4, 30, 66), (0, 3, 4, 30, 66)),
    "one behind the other": (range(20), range(20, 60)),
    "all held": (range(67), (0, 3, 66)),
    "all come": ((0, 3, 66), range(67)),
    "all": (range(67), range(67)),
}
EACH_CHOICE = pytest.mark.parametrize(("held_at", "at"), CHANNELS.values(), ids=CHANNELS.keys())


def channels(of):
    return None if of is None else torch.tensor(list(of), dtype=torch.int64)


def slice_like(weight, indices, dim, dtype=None):
    shape = list(weight.shape)
    shape[dim] = indices.numel()
    return torch.randn(shape, dtype=torch.float64).to(dtype or weight.dtype).to(weight.device)


def call(kernel, weight, held_indices, held, indices, change, dim, original=None):
    """The weight behind the call, and the original."""
    weight = weight.clone()
    if original is None:
        original = torch.full_like(slice_like(weight, indices, dim), torch.nan)
    assert kernel(weight, held_indices, held, indices, change, original, dim) is None
    return weight, original


def inputs(place, dtype, held_at, at, dim, change_dtype=torch.float32, shape=SHAPE):
    weight = torch.randn(shape if dim == 0 else shape[::-1], dtype=torch.float64).to(dtype).to(place.device)
    held_indices, indices = (None if c is None else c.to(place.device) for c in (channels(held_at), channels(at)))
    held = None if held_indices is None else slice_like(weight, held_indices, dim)
    return weight, held_indices, held, indices, slice_like(weight, indices, dim, change_dtype), dim


@EACH
@DIM
@EACH_CHOICE
def test_the_bits_are_those_of_a_write_a_read_and_a_write(operator, place, dtype, dim, held_at, at):
    arguments = weight, held_indices, held, indices, change, _ = inputs(place, dtype, held_at, at, dim)
    expected = weight.clone()
    if held is not None:
        reference.slice_write_(expected, held_indices, held, dim)
    read = expected.index_select(dim, indices)
    reference.slice_write_(expected, indices, read + change, dim)  # torch forms the sum in the wider dtype
    written, original = call(place.kernel(operator, dtype), *arguments)
    assert_same_bits(written, expected, "weight")
    assert_same_bits(original, read, "original")


@EACH
@DIM
@CHANGE
def test_the_sum_is_rounded_once_from_the_widest_dtype(operator, place, dtype, dim, change_dtype):
    if not serves(place, (operator,), change_dtype):
        pytest.skip(f"{place.backend} does not take changes of {dtype_name(change_dtype)}")
    arguments = inputs(place, dtype, *CHANNELS["overlapping"], dim, change_dtype)
    wide = torch.promote_types(torch.promote_types(dtype, change_dtype), torch.float32)
    restored = arguments[0].clone().index_copy_(dim, arguments[1], arguments[2])
    sums = restored.index_select(dim, arguments[3]).to(wide) + arguments[4].to(wide)
    written, _ = call(place.kernel(operator, dtype), *arguments)
    assert_same_bits(written, restored.index_copy_(dim, arguments[3], sums.to(dtype)))


@EACH
@DIM
def test_any_bits_are_read_and_put_back(operator, place, dtype, dim):
    # Infinities, NaNs with payloads, negative zeros and subnormal numbers, of which arithmetic would change some.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[torch.empty((), dtype=dtype).element_size()]
    limits = torch.iinfo(bits)
    weight = torch.randint(limits.min, limits.max, (90, 91), dtype=bits).view(dtype).to(place.device)
    before, kernel = weight.clone(), place.kernel(operator, dtype)
    held_indices = held = None
    for seed in range(4):
        indices = random_channels(90, 13, torch.Generator().manual_seed(seed)).to(place.device)
        original = slice_like(weight, indices, dim)
        kernel(weight, held_indices, held, indices, slice_like(weight, indices, dim), original, dim)
        assert not torch.equal(weight.view(bits), before.view(bits))
        assert_same_bits(original, before.view(bits).index_select(dim, indices).view(dtype), "original")
        held_indices, held = indices, original
    none = indices[:0]
    kernel(weight, held_indices, held, none, slice_like(weight, none, dim), slice_like(weight, none, dim), dim)
    assert_same_bits(weight, before)


@EACH
@DIM
@pytest.mark.parametrize("shape", [(67, 0), (67, 1), (67, 1100), (1300, 3)])
def test_sizes_around_chunks_and_rows_of_no_elements(operator, place, dtype, dim, shape):
    total = shape[0]
    held_at, at = (random_channels(total, total * 3 // 4, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    arguments = inputs(place, dtype, held_at, at, dim, shape=shape)
    expected = call(reference.slice_exchange_, *arguments)
    for actual, right in zip(call(place.kernel(operator, dtype), *arguments), expected, strict=True):
        assert_same_bits(actual, right)


@EACH
@DIM
@pytest.mark.parametrize("layout", ["transposed", "every_other", "offset"])
def test_held_and_change_may_lie_apart(operator, place, dtype, dim, layout):
    weight, held_indices, held, indices, change, _ = inputs(place, dtype, *CHANNELS["overlapping"], dim)
    kernel = place.kernel(operator, dtype)
    apart = laid_out(held, layout), laid_out(change, layout)
    strided = call(kernel, weight, held_indices, apart[0], indices, apart[1], dim)
    for actual, right in zip(strided, call(kernel, weight, held_indices, held, indices, change, dim), strict=True):
        assert_same_bits(actual, right)


@ON_THE_CPU
@DIM
def test_the_same_bits_for_any_number_of_threads(operator, place, dtype, dim):
    held_at, at = (random_channels(400, count) for count in (90, 120))
    arguments = inputs(place, dtype, held_at, at, dim, shape=(400, 700))
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(call(place.kernel(operator, dtype), *arguments))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for actual, right in zip(run, runs[0], strict=True):
            assert_same_bits(actual, right)


@EACH
@pytest.mark.parametrize("missing", ["held", "held_indices"])
def test_what_is_held_comes_with_its_channels(operator, place, dtype, missing):
    weight, held_indices, held, indices, change, dim = inputs(place, dtype, *CHANNELS["overlapping"], 1)
    before, original = weight.clone(), torch.zeros_like(slice_like(weight, indices, dim))
    given = (held_indices, None) if missing == "held" else (None, held)
    with pytest.raises((ValueError, RuntimeError), match=f"slice_exchange_: {missing} must be given with"):
        place.kernel(operator, dtype)(weight, *given, indices, change, original, dim)
    assert_same_bits(weight, before)
