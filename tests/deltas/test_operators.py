"""The operators of the delta algebra on every backend: the bits of the definition, and what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_kernels import libraries
from peft_kernels.reference import deltas as reference
from peft_kernels.reference.deltas import ALL_TIES

from ..support.accuracy import assert_same_bits
from ..support.places import compiled_places, operators_at_places, places

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((1, 1), (3, 7), (129, 577), (2, 70_001), (40_000, 3))
DENSITIES = (0.0, 0.05, 0.9, 1.0)


class Inputs:
    """Two random deltas of one matrix."""

    def __init__(self, shape, density, dtype, device="cpu", index_dtype=torch.int32):
        generator = torch.Generator().manual_seed(shape[0] + int(10 * density))
        self.columns, self.numel, self.dtype = shape[1], shape[0] * shape[1], dtype
        self.wide = dtype == torch.float64
        self.work = torch.float64 if self.wide else torch.float32
        count = int(self.numel * density)
        self.indices, self.values = [], []
        for _ in range(2):
            chosen = torch.randperm(self.numel, generator=generator)[:count].sort().values.to(index_dtype)
            self.indices.append((chosen if density < 1 else chosen[:0]).to(device))
            values = 0.01 * torch.randn(count, generator=generator, dtype=torch.float64)
            values[torch.rand(count, generator=generator) < 0.05] = 0.0
            self.values.append(values.to(dtype).to(device))
        self.mask = (torch.rand(count, generator=generator) < 0.3).to(device)
        self.factors = torch.rand(self.columns, generator=generator, dtype=self.work).to(device)
        self.state = torch.tensor([5, 2**40 + 3], device=device)
        self.competition = torch.tensor(
            [[1e-4, 2e-2, 1e-5, 3e-3, 1.0], [2e-4, 3e-2, 0.0, 2e-3, 0.5]], dtype=torch.float64, device=device
        )

    def keys(self):
        """Keys that occur, at a tenth and at half of the way down."""
        if not self.values[0].numel():
            return 3, 2
        falling = reference.keys(self.values[0], self.wide).sort(descending=True).values
        return int(falling[len(falling) // 10]), int(falling[len(falling) // 2])


def histogram(i):
    first, _ = i.keys()
    for shift, bits in ((47, 16), (31, 16), (0, 15)) if i.wide else ((15, 16), (0, 15)):
        yield torch.zeros(2**bits, dtype=torch.int64), i.values[0], i.wide, shift, bits, first >> (shift + bits)


def magnitude(i):
    first, last = i.keys()
    for first_ties, last_ties in ((0, 1), (1, 0), (ALL_TIES, ALL_TIES), (0, ALL_TIES), (3, 2)):
        yield i.values[0], i.wide, first, first_ties, last, last_ties


def row(i):
    for factors in (None, i.factors):
        for first, last in ((0, 0), (0, max(1, i.columns // 3)), (i.columns // 10, i.columns // 2), (2, 10**9)):
            yield i.indices[0], i.values[0], factors, i.columns, i.wide, first, last


def random(i):
    for p in (0.0, 0.3, 1.0):
        yield i.indices[0], i.values[0], i.columns, p, i.state


def compact(i):
    for factor in (1.0, -1.0, 10.0 / 3.0):
        yield i.indices[0], i.values[0], i.mask, factor


def merge(i):
    for dtype in (torch.float32, i.dtype):
        yield i.indices, i.values, [0.7, 1.3], i.numel, dtype
    yield i.indices[:1], i.values[:1], [1.0], i.numel, torch.float64


def compete(i):
    yield i.indices, i.values, i.competition, i.numel, i.work


CALLS = {
    "delta_count_keys_": histogram,
    "delta_magnitude_mask": magnitude,
    "delta_row_mask": row,
    "delta_random_mask": random,
    "delta_compact": compact,
    "delta_sum": merge,
    "delta_ties": merge,
}


def run(kernel, arguments):
    """The results of a call, as a tuple; counters are cleared first."""
    if (
        arguments[0] is not None
        and not isinstance(arguments[0], list)
        and arguments[0].dtype == torch.int64
        and len(arguments) == 6
    ):
        counts = torch.zeros_like(arguments[0])
        kernel(counts, *arguments[1:])
        return (counts,)
    result = kernel(*arguments)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(CALLS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_the_definition(operator, place, dtype, shape):
    kernel = place.kernel(operator, dtype)
    for density in DENSITIES:
        inputs = Inputs(shape, density, dtype, place.device, torch.int64 if shape == (3, 7) else torch.int32)
        for arguments in CALLS[operator](inputs):
            for actual, expected in zip(
                run(kernel, arguments), run(getattr(reference, operator), arguments), strict=True
            ):
                assert_same_bits(actual, expected, f"{operator}, density {density}")


@pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(["delta_compete"]))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_competition(operator, place, dtype, shape):
    for density in DENSITIES:
        (arguments,) = compete(Inputs(shape, density, dtype, place.device))
        actual, expected = place.kernel(operator, dtype)(*arguments), reference.delta_compete(*arguments)
        assert_same_bits(actual[0], expected[0])
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-4 if dtype != torch.float64 else 1e-10, atol=0)


@pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(["delta_count_scores_"]))
@pytest.mark.parametrize("density", DENSITIES)
def test_scores_are_counted(operator, place, dtype, density):
    # Score by score from the definition; exp and tanh may differ in the last place, which moves few to the next bin.
    inputs = Inputs((129, 577), density, dtype, place.device)
    levels = ((48, 16), (32, 16)) if inputs.wide else ((16, 16), (0, 16))
    for shift, bits in levels:
        results = []
        for kernel in (place.kernel(operator, dtype), reference.delta_count_scores_):
            counts = torch.zeros(2 << bits, dtype=torch.int64, device=place.device)
            largest = torch.zeros(2, dtype=torch.int64, device=place.device)
            kernel(
                counts,
                largest,
                inputs.indices,
                inputs.values,
                inputs.competition,
                inputs.numel,
                shift,
                bits,
                [0x8000, 0xB000],
            )
            results.append((counts, largest))
        (counts, largest), (expected_counts, expected_largest) = results
        cumulative = (counts.cumsum(0) - expected_counts.cumsum(0)).abs()
        assert int(cumulative.max()) <= max(2, int(0.001 * inputs.numel))
        if (shift, bits) == levels[0]:
            assert int(counts.sum()) == sum(int(torch.count_nonzero(values)) for values in inputs.values)
        assert int((largest - expected_largest).abs().max()) <= 16


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_other_instruction_sets(capability):
    if libraries.missing["_C"] is not None:
        pytest.skip(libraries.missing["_C"])
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "cpu-cpu and not instruction"]
    environment = {**os.environ, "PEFT_KERNELS_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(("namespace", "device"), compiled_places("delta_sum"))
@pytest.mark.parametrize("operator", [*CALLS, "delta_compete"])
def test_opcheck(namespace, device, operator):
    for density in (0.0, 0.3, 1.0):
        inputs = Inputs((5, 13), density, torch.float32, device)
        arguments = next((compete if operator == "delta_compete" else CALLS[operator])(inputs))
        torch.library.opcheck(getattr(getattr(torch.ops, namespace), operator).default, arguments)


def good():
    return Inputs((5, 13), 0.3, torch.float32)


def changed(operator, position, value):
    """The first call of an operator with one argument changed."""
    arguments = list(next((compete if operator == "delta_compete" else CALLS[operator])(good())))
    arguments[position] = value(arguments[position])
    return arguments


def in_list(function):
    return lambda tensors: [function(tensors[0]), *tensors[1:]]


BAD = [
    ("delta_count_keys_", 1, lambda v: v.int(), "values must be float32, bfloat16, float16 or float64"),
    ("delta_count_keys_", 1, lambda v: v[None], "values must be 1-D"),
    ("delta_count_keys_", 0, lambda v: v.int(), "counts must be int64 with 65536 elements"),
    ("delta_count_keys_", 3, lambda v: 16, "shift and bits must name at most 16 of 31 bits, got 16 and 16"),
    ("delta_magnitude_mask", 2, lambda v: -1, "first_key and last_key must be keys of 31 bits, got -1"),
    ("delta_magnitude_mask", 4, lambda v: 2**31, "first_key and last_key must be keys of 31 bits"),
    ("delta_magnitude_mask", 3, lambda v: -1, "first_ties and last_ties must be at least 0"),
    ("delta_row_mask", 0, lambda v: v[:-1], "indices must be .19., as many as values, or empty, got int32 .18."),
    ("delta_row_mask", 0, lambda v: v.float(), "indices must be int32 or int64"),
    ("delta_row_mask", 3, lambda v: 0, "columns must be at least 1, got 0"),
    ("delta_row_mask", 2, lambda v: torch.ones(13).double(), "factors must be float32, got float64"),
    ("delta_row_mask", 2, lambda v: torch.ones(12), "factors must be .13."),
    ("delta_row_mask", 6, lambda v: -1, "last must be at least first"),
    ("delta_random_mask", 3, lambda v: 1.5, r"dropout_p must be in \[0, 1\], got 1.5"),
    ("delta_random_mask", 3, lambda v: float("nan"), r"dropout_p must be in \[0, 1\], got nan"),
    ("delta_random_mask", 4, lambda v: v[:1], "rng_state must be int64 .2."),
    ("delta_compact", 2, lambda v: v.int(), "mask must be bool"),
    ("delta_compact", 2, lambda v: v[1:], "mask must be .19."),
    ("delta_sum", 1, lambda v: [], "values must be a list of 1 to 64 tensors, got 0"),
    ("delta_sum", 0, lambda v: v[:1], "indices must be a list as long as values, 2, got 1"),
    ("delta_sum", 2, lambda v: [1.0], "weights must be a list as long as values, 2, got 1"),
    ("delta_sum", 3, lambda v: 18, "values must have at most as many numbers as there are positions, 18, got"),
    ("delta_sum", 4, lambda v: torch.int32, "dtype must be float32, bfloat16, float16 or float64, got int32"),
    ("delta_sum", 1, in_list(lambda v: v.int()), "values must be float32"),
    ("delta_ties", 2, lambda v: [1.0, -1.0], "weights must be above 0, got -1"),
    ("delta_compete", 2, lambda v: v[:, :4], "competition must be"),
    ("delta_compete", 2, lambda v: v.float(), r"competition must be float64 \[2, 5\]"),
]


@pytest.mark.parametrize("place", [p for p in places("delta_sum") if p.values[0].backend not in ("reference",)])
@pytest.mark.parametrize(("operator", "position", "value", "message"), BAD)
def test_bad_input(place, operator, position, value, message):
    kernel = place.kernel(operator, torch.float32)
    with pytest.raises(RuntimeError, match=f"{operator}: .*{message}"):
        kernel(*changed(operator, position, value))


def test_dense_values_must_be_whole_rows():
    if libraries.missing["_C"] is not None:
        pytest.skip(libraries.missing["_C"])
    nowhere = torch.empty(0, dtype=torch.int32)
    for operator, arguments in {
        "delta_row_mask": (nowhere, torch.ones(7), None, 3, False, 0, 1),
        "delta_random_mask": (nowhere, torch.ones(7), 3, 0.5, torch.tensor([0, 0])),
    }.items():
        with pytest.raises(RuntimeError, match="values must be whole rows of 3, got"):
            getattr(torch.ops.peft_kernels, operator)(*arguments)
    with pytest.raises(RuntimeError, match="values must have one number for each of 8"):
        torch.ops.peft_kernels.delta_sum([nowhere], [torch.ones(7)], [1.0], 8, torch.float32)
