"""`gather_columns`: bits of every dtype, strides, sizes; always a tensor of its own."""

from __future__ import annotations

import pytest
import torch

import peft_kernels  # noqa: F401

from ..support.accuracy import assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.places import places_and_dtypes
from ..support.s2ft import random_channels

OPERATOR = "gather_columns"
EACH_PLACE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(OPERATOR))
# (M, K, s): nothing, one, all, odd, and large enough for several threads.
SIZES = ((0, 5, 2), (3, 0, 0), (4, 7, 0), (1, 1, 1), (5, 33, 33), (37, 45, 7), (300, 1000, 31), (2, 4100, 2050))


@EACH_PLACE
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_exact_copies(place, dtype, size):
    m, k, s = size
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[torch.empty((), dtype=dtype).element_size()]
    limits = torch.iinfo(bits)
    # Any bits: NaNs with payloads, negative zeros and subnormal numbers, of which arithmetic would change some.
    x = torch.randint(limits.min, limits.max, (m, k), dtype=bits).view(dtype).to(place.device)
    indices = random_channels(k, s).to(place.device)
    out = place.kernel(OPERATOR, dtype)(x, indices)
    assert out.is_contiguous() and out.shape == (m, s)
    assert m * k == 0 or out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert_same_bits(out, x[:, indices])


@EACH_PLACE
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
def test_strides(place, dtype, layout):
    x, indices = torch.randn(17, 40).to(dtype).to(place.device), random_channels(40, 9).to(place.device)
    view = x[:1].expand(17, 40) if layout == "expanded" else laid_out(x, layout)
    assert_same_bits(place.kernel(OPERATOR, dtype)(view, indices), view[:, indices])
