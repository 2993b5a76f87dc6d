"""The limits are the hand-counted ones."""

from __future__ import annotations

import pytest

from benchmarks.limits import Shape

# A square layer of Llama-3-8B on a device of 800 TFLOP/s that copies 3.0 TB/s.
LAYER = Shape(M=8192, K=4096, N=4096, r=16, element_size=2)
FROZEN_SECONDS = 4 * 8192 * 4096 * 4096 / 800e12


def test_operations_are_those_of_the_products() -> None:
    tiny = Shape(M=2, K=3, N=5, r=1, element_size=4)
    assert tiny.frozen_operations(backward=False) == 2 * 2 * 3 * 5
    assert tiny.frozen_operations(backward=True) == 2 * 2 * 2 * 3 * 5
    assert tiny.added_operations(backward=False) == 2 * 2 * 3 + 2 * 2 * 5
    assert tiny.added_operations(backward=True) == 3 * (2 * 2 * 3 + 2 * 2 * 5)


def test_bytes_are_one_read_of_each_operand_and_hidden() -> None:
    tiny = Shape(M=2, K=3, N=5, r=1, element_size=4)
    assert tiny.added_bytes(backward=False) == 2 * (3 * 4 + 2 * 4)
    assert tiny.added_bytes(backward=True) == 2 * ((3 + 5 + 3) * 4 + 6 * 4)
    assert tiny.saved_bytes() == 2 * (3 * 4 + 4)


def test_ideal_ratio_of_a_llama_layer() -> None:
    assert LAYER.ideal_ratio(backward=True) == pytest.approx(1.012, abs=5e-4)
    assert LAYER.ideal_ratio(backward=False) == pytest.approx(1.008, abs=5e-4)


def test_split_ratio_of_a_llama_layer() -> None:
    assert LAYER.split_ratio(True, FROZEN_SECONDS, 3.0e12) == pytest.approx(1.102, abs=4e-3)


def test_split_is_never_below_ideal() -> None:
    for bytes_per_second in (1e9, 1e12, 1e15):
        for backward in (False, True):
            split = LAYER.split_ratio(backward, FROZEN_SECONDS, bytes_per_second)
            assert split >= LAYER.ideal_ratio(backward) - 1e-12
