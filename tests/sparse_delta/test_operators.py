"""The operators that change a weight in place, on every backend of this machine, against the definition in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_kernels import libraries
from peft_kernels.reference import sparse_delta as reference

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import laid_out
from ..support.places import ALL_DTYPES, dtype_name, operators_at_places, serves
from ..support.sparse_delta import CHANGED, IN_PLACE, random_delta

# Shapes of the weight and how many entries change: none, one, all; around chunks and vectors; a gap of many lines.
SIZES = (
    ((1, 1), 0), ((1, 1), 1), ((0, 5), 0), ((7, 33), 1), ((5, 13), 65), ((7, 33), 231), ((31, 67), 511),
    ((31, 67), 513), ((64, 65), 2049), ((300, 301), 77), ((90, 91), 5_000), ((3, 5, 7), 20), ((90,), 17),
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]

EACH_OPERATOR = pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(IN_PLACE))
EACH_KERNEL = pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(IN_PLACE, backend="cpu"))
VALUES = pytest.mark.parametrize("values_dtype", ALL_DTYPES, ids=dtype_name)
INDICES = pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=dtype_name)


def skip_unless_served(place, operator, dtype):
    if not serves(place, (operator,), dtype):
        pytest.skip(f"{place.backend} does not take values of {dtype_name(dtype)}")


def check(delta, operator, place, **changes):
    """Runs the operator and holds each result to the accuracy of the definition in the same dtypes."""
    actual = delta.run(place.kernel(operator, delta.weight.dtype), operator, **changes)
    definition = getattr(reference, operator)
    own = delta.run(definition, operator, **changes)
    exact = delta.map(torch.Tensor.double).run(definition, operator, **changes)
    for name, result in actual.items():
        assert result.dtype == own[name].dtype
        assert_accurate(result, own[name], exact[name], name)
    return actual


@EACH_OPERATOR
@VALUES
@pytest.mark.parametrize(("shape", "count"), SIZES, ids=str)
def test_sizes(operator, place, dtype, values_dtype, shape, count):
    skip_unless_served(place, operator, values_dtype)
    index_dtype = torch.int32 if SIZES.index((shape, count)) % 2 else torch.int64
    dtypes = {"dtype": dtype, "values_dtype": values_dtype, "index_dtype": index_dtype, "device": place.device}
    delta = random_delta(shape, count, **dtypes)
    results = check(delta, operator, place)
    untouched = torch.ones(delta.weight.numel(), dtype=torch.bool, device=place.device)
    untouched[delta.indices.long()] = False
    assert_same_bits(results["weight"].view(-1)[untouched], delta.weight.view(-1)[untouched], "other entries")


@pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(("scatter_write_", "scatter_accumulate_")))
@VALUES
@INDICES
def test_scatters_have_the_bits_of_the_definition(operator, place, dtype, values_dtype, index_dtype):
    skip_unless_served(place, operator, values_dtype)
    dtypes = {"dtype": dtype, "values_dtype": values_dtype, "index_dtype": index_dtype, "device": place.device}
    delta = random_delta((200, 201), 9001, **dtypes)
    actual = delta.run(place.kernel(operator, dtype), operator)
    assert_same_bits(actual["weight"], delta.run(getattr(reference, operator), operator)["weight"])


@pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(("sparse_adamw_",)))
@VALUES
def test_adamw_without_a_weight(operator, place, dtype, values_dtype):
    skip_unless_served(place, operator, values_dtype)
    delta = random_delta((60, 61), 1777, dtype=dtype, values_dtype=values_dtype, device=place.device)
    alone = check(delta, operator, place, weight=None, indices=None, original=None)
    assert alone.keys() == {"values", "exp_avg", "exp_avg_sq"}
    for name, tensor in delta.run(place.kernel(operator, dtype), operator).items():
        if name != "weight":
            assert_same_bits(alone[name], tensor, name)


@pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(("sparse_adamw_",)))
@pytest.mark.parametrize("beta1", [0.0, 0.4, 0.6])
@pytest.mark.parametrize("beta2", [0.0, 0.9])
@pytest.mark.parametrize("step", [1, 2, 100_000])
def test_adamw_with_other_numbers(operator, place, dtype, beta1, beta2, step):
    delta = random_delta(dtype=dtype, device=place.device)
    results = check(delta, operator, place, beta1=beta1, beta2=beta2, step=step, weight_decay=0.0)
    if beta1 == 0.0:
        assert_same_bits(results["exp_avg"], delta.grad)


@EACH_OPERATOR
def test_only_what_the_schema_says_is_written(operator, place, dtype):
    delta = random_delta(dtype=dtype, device=place.device)
    own = delta.copy().arguments(operator)
    place.kernel(operator, dtype)(*own.values())
    for name, argument in own.items():
        if isinstance(argument, torch.Tensor):
            if name in CHANGED[operator]:
                assert not torch.equal(argument, getattr(delta, name))
            else:
                assert_same_bits(argument, getattr(delta, name), name)


@pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(("scatter_write_", "scatter_accumulate_")))
@pytest.mark.parametrize("layout", ["every_other", "offset"])
def test_values_and_original_may_lie_apart(operator, place, dtype, layout):
    delta = random_delta(dtype=dtype, device=place.device)
    kernel = place.kernel(operator, dtype)
    names = ("original", "values") if operator == "scatter_write_" else ("values",)
    strided = {name: laid_out(getattr(delta, name), layout) for name in names}
    assert_same_bits(delta.run(kernel, operator, **strided)["weight"], delta.run(kernel, operator)["weight"])


@EACH_OPERATOR
def test_a_weight_in_the_middle_of_memory(operator, place, dtype):
    # Memory that no vector register would be aligned to, with neighbors that must not change.
    delta = random_delta(dtype=dtype, device=place.device)
    surroundings = torch.full((delta.weight.numel() + 6,), -3.0, dtype=dtype, device=place.device)
    weight = surroundings[3:-3].view_as(delta.weight).copy_(delta.weight)
    result = delta.run(place.kernel(operator, dtype), operator, weight=weight)["weight"]
    assert_same_bits(result, delta.run(place.kernel(operator, dtype), operator)["weight"])
    assert (surroundings[:3] == -3.0).all()
    assert (surroundings[-3:] == -3.0).all()


@EACH_OPERATOR
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(operator, place, dtype, value):
    delta = random_delta(dtype=dtype, device=place.device)
    (delta.values if operator.startswith("scatter") else delta.grad)[11] = value
    results = delta.run(place.kernel(operator, dtype), operator)
    exact = delta.map(torch.Tensor.double).run(getattr(reference, operator), operator)
    for name, result in results.items():
        assert torch.equal(result.isfinite(), exact[name].isfinite()), name


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@EACH_KERNEL
@INDICES
def test_same_bits_for_any_number_of_threads(operator, place, dtype, index_dtype, restored_threads):
    delta = random_delta((300, 301), 60_001, dtype=dtype, index_dtype=index_dtype)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs += [delta.run(place.kernel(operator, dtype), operator) for _ in range(2)]
    for run in runs[1:]:
        for name, tensor in run.items():
            assert_same_bits(tensor, runs[0][name], name)


# The CPU kernels have the same bits with every instruction set: results of a process of its own, saved to a file.
SAVE = """
import sys, torch, peft_kernels
from tests.support.places import ALL_DTYPES
from tests.support.sparse_delta import IN_PLACE, random_delta

def results(operator, dtype, values_dtype):
    delta = random_delta((60, 61), 1601, dtype=dtype, values_dtype=values_dtype)
    return delta.run(getattr(torch.ops.peft_kernels, operator), operator)

torch.save([results(op, w, v) for op in IN_PLACE for w in ALL_DTYPES for v in ALL_DTYPES], sys.argv[1])
"""


@pytest.mark.skipif(libraries.missing["_C"] is not None, reason="the compiled library is not built")
def test_same_bits_with_every_instruction_set(tmp_path):
    # A capability that the processor lacks lowers to the best it has.
    results = []
    for capability in ("baseline", "avx2", "avx512", "amx"):
        path = tmp_path / capability
        environment = {**os.environ, "PEFT_KERNELS_CPU_CAPABILITY": capability}
        done = subprocess.run(
            [sys.executable, "-c", SAVE, path], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        results.append(torch.load(path))
    for other in results[1:]:
        for left, right in zip(other, results[0], strict=True):
            for name, tensor in left.items():
                assert_same_bits(tensor, right[name], name)


@pytest.mark.skipif(libraries.missing["_C"] is not None, reason="the compiled library is not built")
def test_unknown_capability_is_refused():
    program = "import torch, peft_kernels; w = torch.ones(3); i = torch.tensor([1]);"
    program += "torch.ops.peft_kernels.scatter_accumulate_(w, i, torch.ones(1), 1.0)"
    environment = {**os.environ, "PEFT_KERNELS_CPU_CAPABILITY": "sse"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode > 0
    assert "PEFT_KERNELS_CPU_CAPABILITY must be baseline, avx2, avx512 or amx, got sse" in done.stderr
