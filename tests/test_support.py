"""The tests' own tools do what the tests rely on."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from peft_kernels import libraries

from .support import philox
from .support.accuracy import assert_accurate, assert_same_bits
from .support.layouts import LAYOUTS, laid_out
from .support.operators import OPERATORS, random_call
from .support.places import Place

MAKERS = [
    pytest.param(torch.empty, id="empty"),
    pytest.param(torch.ones(1).new_empty, id="new_empty"),
    pytest.param(lambda n: torch.empty_strided((n,), (1,)), id="empty_strided"),
    pytest.param(lambda n: torch.empty_like(torch.ones(n)), id="empty_like"),
]


@pytest.mark.parametrize("make", MAKERS)
def test_fresh_memory_is_nan(make):
    assert make(5).isnan().all()


@pytest.mark.skipif(libraries.missing["_C"] is not None, reason="_C is not built")
@pytest.mark.parametrize("operator", OPERATORS)
def test_fresh_memory_of_compiled_operators_is_nan(operator):
    call = random_call(operator, rows=300, columns=70, out_columns=60, dropout_p=0.1)
    kernel = Place("cpu", "cpu").kernel(operator, torch.float32)
    with profile(activities=[ProfilerActivity.CPU]) as events:
        kernel(*call.arguments.values())
    names = [event.name for event in events.events()]
    allocations = sum(name in ("aten::empty", "aten::empty_strided") for name in names)
    assert sum(name == "aten::fill_" for name in names) >= allocations
    # The result of lora_matmul comes from torch's matrix product; lora_accumulate_ has none.
    assert allocations > 0 or operator in ("lora_matmul", "lora_accumulate_")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (5,)])
def test_layouts_keep_values_and_change_strides(shape, layout):
    tensor = torch.randn(shape)
    view = laid_out(tensor, layout)
    assert torch.equal(view, tensor)
    one_vector_in_a_row = layout in ("offset", "padded") and len(shape) == 1
    assert view.is_contiguous() == (layout == "contiguous" or one_vector_in_a_row)


def test_accuracy_rule_passes_twice_and_fails_three_times_the_own_error():
    exact = torch.randn(1000, dtype=torch.float64)
    error = torch.randn(1000, dtype=torch.float64) * 1e-3
    assert_accurate((exact + 1.9 * error).float(), exact + error, exact, "result")
    with pytest.raises(AssertionError, match="root mean square error"):
        assert_accurate((exact + 3 * error).float(), exact + error, exact, "result")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e6])
def test_accuracy_rule_sees_a_single_wrong_element(wrong):
    exact = torch.randn(1000, dtype=torch.float64)
    actual = exact.float()
    actual[17] = wrong
    with pytest.raises(AssertionError):
        assert_accurate(actual, exact.bfloat16(), exact, "result")


def test_same_bits_distinguishes_zeros_by_sign():
    with pytest.raises(AssertionError, match="1 of 2 elements differ"):
        assert_same_bits(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))


@pytest.mark.parametrize(("counter", "key", "expected"), philox.KNOWN_ANSWERS)
def test_python_philox_gives_the_published_answers(counter, key, expected):
    assert philox.philox(counter, key) == expected
