"""The Philox header that CPU and CUDA kernels share, through `_host`: the documented layout, and no bad arguments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_kernels import libraries
from peft_kernels.reference import philox as reference

from ..support import philox

if libraries.host is None:
    pytest.skip(f"no _host module: {libraries.missing['_host']}", allow_module_level=True)
host = libraries.host

INT64 = st.integers(-(2**63), 2**63 - 1)


@given(seed=INT64, offset=INT64, row=st.integers(0, 2**32 - 1), columns=st.integers(0, 40))
def test_draws_are_those_of_the_documented_stream(seed, offset, row, columns):
    assert host.philox_draws(seed, offset, row, columns) == philox.draws(row, columns, seed, offset)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 100])
def test_draws_against_the_threshold_give_the_reference_mask(columns):
    seed, offset, dropout_p = -(2**62) + 3, 2**61 + 11, 0.3
    expected = reference.dropout_mask(5, columns, dropout_p, torch.tensor([seed, offset]))
    threshold = host.dropout_threshold(dropout_p)
    actual = [[draw >= threshold for draw in host.philox_draws(seed, offset, row, columns)] for row in range(5)]
    assert torch.equal(torch.tensor(actual), expected)


@given(st.floats(0.0, 1.0))
def test_threshold_is_that_of_the_reference(dropout_p):
    assert host.dropout_threshold(dropout_p) == reference.dropout_threshold(dropout_p)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.1, float("nan"), float("inf")])
def test_threshold_refuses_what_is_no_probability(dropout_p):
    with pytest.raises(ValueError, match=r"dropout_p must be a probability in \[0, 1\], got"):
        host.dropout_threshold(dropout_p)


def test_draws_refuse_a_negative_number_of_columns():
    with pytest.raises(ValueError, match="columns must not be negative, got -1"):
        host.philox_draws(0, 0, 0, -1)


@pytest.mark.parametrize("row", [-1, 2**32])
def test_draws_refuse_a_row_beyond_32_bits(row):
    with pytest.raises(TypeError):
        host.philox_draws(0, 0, row, 8)


def test_build_information_names_the_compiler():
    assert any(character.isdigit() for character in host.build_info)


def test_cpu_features_agree_with_the_kernel():
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line.split(":")[1].split() for line in file if line.startswith("flags")), None)
    except OSError:
        flags = None
    if flags is None:
        pytest.skip("/proc/cpuinfo does not list x86 flags on this machine")
    expected = {name: name in flags for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")}
    assert host.cpu_features() == expected
