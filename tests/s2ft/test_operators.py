"""The operators that change a weight in place, on every backend of this machine, against the definition in float64."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_kernels import libraries
from peft_kernels.reference import s2ft as reference

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import laid_out
from ..support.places import ALL_DTYPES, compiled_cases, dtype_name, operators_at_places, places, serves
from ..support.s2ft import CHANGED, IN_PLACE, random_slice

# Shapes of the weight and how many channels train: none, one, all; around chunks; many rows of few channels.
SIZES = (
    ((1, 1), 0), ((1, 1), 1), ((0, 5), 0), ((5, 0), 0), ((7, 33), 1), ((5, 5), 5), ((33, 33), 33), ((70, 61), 23),
    ((9, 1100), 5), ((900, 30), 2), ((40, 600), 40),
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]

EACH_OPERATOR = pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(IN_PLACE))
EACH_KERNEL = pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(IN_PLACE, backend="cpu"))
EACH_WRITE = pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(("slice_write_",)))
VALUES = pytest.mark.parametrize("values_dtype", ALL_DTYPES, ids=dtype_name)
DIM = pytest.mark.parametrize("dim", [0, 1])


def skip_unless_served(place, operator, dtype):
    if not serves(place, (operator,), dtype):
        pytest.skip(f"{place.backend} does not take values of {dtype_name(dtype)}")


def check(own_slice, operator, place, **changes):
    """Runs the operator and holds each result to the accuracy of the definition in the same dtypes."""
    actual = own_slice.run(place.kernel(operator, own_slice.weight.dtype), operator, **changes)
    definition = getattr(reference, operator)
    own = own_slice.run(definition, operator, **changes)
    exact = own_slice.map(torch.Tensor.double).run(definition, operator, **changes)
    for name, result in actual.items():
        assert result.dtype == own[name].dtype
        assert_accurate(result, own[name], exact[name], name)
    return actual


@EACH_OPERATOR
@VALUES
@DIM
def test_sizes(operator, place, dtype, values_dtype, dim):
    skip_unless_served(place, operator, values_dtype)
    for shape, count in SIZES:
        count = min(count, shape[dim])
        own = random_slice(shape, count, dim, dtype=dtype, values_dtype=values_dtype, device=place.device)
        results = check(own, operator, place)
        untouched = torch.ones(shape[dim], dtype=torch.bool, device=place.device).index_fill(0, own.indices, False)
        if operator == "slice_exchange_":
            untouched.index_fill_(0, own.held_indices, False)
        others = untouched.nonzero().flatten()
        before, after = (weight.index_select(dim, others) for weight in (own.weight, results["weight"]))
        assert_same_bits(after, before, f"other channels of {shape}")


@EACH_WRITE
@VALUES
@DIM
def test_writes_have_the_bits_of_the_definition(operator, place, dtype, values_dtype, dim):
    skip_unless_served(place, operator, values_dtype)
    own = random_slice((200, 201), 31, dim, dtype=dtype, values_dtype=values_dtype, device=place.device)
    actual = own.run(place.kernel(operator, dtype), operator)
    assert_same_bits(actual["weight"], own.run(getattr(reference, operator), operator)["weight"])


@EACH_WRITE
@DIM
def test_any_bits_are_written_and_taken_back(operator, place, dtype, dim):
    # Infinities, NaNs with payloads, negative zeros and subnormal numbers, of which arithmetic would change some.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[torch.empty((), dtype=dtype).element_size()]
    limits = torch.iinfo(bits)
    weight = torch.randint(limits.min, limits.max, (90, 91), dtype=bits).view(dtype).to(place.device)
    own = random_slice((90, 91), 13, dim, device=place.device)
    before = weight.clone()
    original = before.view(bits).index_select(dim, own.indices).view(dtype)
    write = place.kernel(operator, dtype)
    write(weight, own.indices, own.trainable, dim)
    assert not torch.equal(weight.view(bits), before.view(bits))
    write(weight, own.indices, original, dim)
    assert_same_bits(weight, before)


@EACH_WRITE
@DIM
@pytest.mark.parametrize("layout", ["transposed", "every_other", "offset"])
def test_values_may_lie_apart(operator, place, dtype, dim, layout):
    own = random_slice(dim=dim, dtype=dtype, device=place.device)
    kernel = place.kernel(operator, dtype)
    strided = own.run(kernel, operator, values=laid_out(own.trainable, layout))
    assert_same_bits(strided["weight"], own.run(kernel, operator)["weight"])


@pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(("slice_adamw_",)))
@VALUES
def test_adamw_without_a_weight(operator, place, dtype, values_dtype):
    skip_unless_served(place, operator, values_dtype)
    own = random_slice((60, 61), 17, dtype=dtype, values_dtype=values_dtype, device=place.device)
    alone = check(own, operator, place, weight=None, indices=None)
    assert alone.keys() == {"trainable", "exp_avg", "exp_avg_sq"}
    for name, tensor in own.run(place.kernel(operator, dtype), operator).items():
        if name != "weight":
            assert_same_bits(alone[name], tensor, name)


@EACH_OPERATOR
def test_only_what_the_schema_says_is_written(operator, place, dtype):
    own = random_slice(dtype=dtype, device=place.device)
    arguments, untouched = own.copy().arguments(operator), own.arguments(operator)
    place.kernel(operator, dtype)(*arguments.values())
    for name, argument in arguments.items():
        if isinstance(argument, torch.Tensor):
            before = untouched[name]
            if name in CHANGED[operator]:
                assert not torch.equal(argument, before)
            else:
                assert_same_bits(argument, before, name)


@EACH_OPERATOR
@DIM
def test_a_weight_in_the_middle_of_memory(operator, place, dtype, dim):
    # Memory that no vector register would be aligned to, with neighbors that must not change.
    own = random_slice(dim=dim, dtype=dtype, device=place.device)
    surroundings = torch.full((own.weight.numel() + 6,), -3.0, dtype=dtype, device=place.device)
    weight = surroundings[3:-3].view_as(own.weight).copy_(own.weight)
    result = own.run(place.kernel(operator, dtype), operator, weight=weight)["weight"]
    assert_same_bits(result, own.run(place.kernel(operator, dtype), operator)["weight"])
    assert (surroundings[:3] == -3.0).all()
    assert (surroundings[-3:] == -3.0).all()


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@EACH_KERNEL
@DIM
def test_same_bits_for_any_number_of_threads(operator, place, dtype, dim, restored_threads):
    own = random_slice((700, 701), 93, dim, dtype=dtype)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(own.run(place.kernel(operator, dtype), operator))
    for run in runs[1:]:
        for name, tensor in run.items():
            assert_same_bits(tensor, runs[0][name], name)


# The CPU kernels have the same bits with every instruction set: results of a process of its own, saved to a file.
SAVE = """
import sys, torch, peft_kernels
from tests.support.places import ALL_DTYPES
from tests.support.s2ft import IN_PLACE, random_slice

def results(operator, dtype, values_dtype):
    own = random_slice((60, 61), 17, dtype=dtype, values_dtype=values_dtype)
    return own.run(getattr(torch.ops.peft_kernels, operator), operator)

torch.save([results(op, w, v) for op in IN_PLACE for w in ALL_DTYPES for v in ALL_DTYPES], sys.argv[1])
"""


@pytest.mark.skipif(libraries.missing["_C"] is not None, reason="the compiled library is not built")
def test_same_bits_with_every_instruction_set(tmp_path):
    # A capability that the processor lacks lowers to the best it has.
    results = []
    for capability in ("baseline", "avx512"):
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


NAN = float("nan")


def half(tensor):
    return tensor.bfloat16()


def apart(tensor):
    return torch.cat([tensor, tensor], -1)[..., ::2]


# What is changed about a good call (float32; weight [20, 24], 5 channels at dim 1) and the message.
TARGET = [
    ({"weight": torch.Tensor.int}, r"weight must be float32, .*, got int32 \[20, 24\] on"),
    ({"weight": torch.t}, r"weight must be contiguous, got float32 \[24, 20\] on .* with strides \[1, 24\]"),
    ({"weight": lambda t: t.view(5, 4, 24)}, r"weight must be 2-D, got float32 \[5, 4, 24\]"),
    ({"indices": torch.Tensor.int}, r"indices must be int64, got int32 \[5\]"),
    ({"indices": lambda t: t[:, None]}, r"indices must be 1-D, got int64 \[5, 1\]"),
    ({"indices": apart}, r"indices must be contiguous, got int64 \[5\] on .* with strides \[2\]"),
    ({"indices": lambda t: torch.arange(25, device=t.device)}, r"indices must be at most .* 24, got int64 \[25\]"),
    ({"dim": 2}, "dim must be 0 or 1, got 2"),
    ({"dim": -1}, "dim must be 0 or 1, got -1"),
]  # fmt: skip
WRITE = [
    ({"values": lambda t: t[:-1]}, r"values must be \[20, 5\], got float32 \[19, 5\]"),
    ({"values": lambda t: t[0]}, r"values must be 2-D, got float32 \[5\]"),
    ({"values": torch.Tensor.int}, r"values must be float32, .*, got int32 \[20, 5\]"),
    ({"dim": 0}, r"values must be \[5, 24\], got float32 \[20, 5\]"),
]
STEP = [
    ({"trainable": lambda t: t[0]}, r"trainable must be 2-D, got float32 \[5\]"),
    ({"trainable": torch.Tensor.int}, r"trainable must be float32, .*, got int32 \[20, 5\]"),
    ({"trainable": apart}, r"trainable must be contiguous, got float32 \[20, 5\]"),
    ({"indices": lambda t: t[:4]}, r"trainable must be \[20, 4\], got float32 \[20, 5\]"),
    *(
        case
        for name in ("grad", "exp_avg", "exp_avg_sq")
        for case in (
            ({name: lambda t: t[:-1]}, rf"{name} must be \[20, 5\], got float32 \[19, 5\]"),
            ({name: half}, rf"{name} must have trainable's dtype, float32, got bfloat16 \[20, 5\]"),
            ({name: apart}, rf"{name} must be contiguous, got float32 \[20, 5\]"),
        )
    ),
    ({"weight": None}, "weight must be given with indices, got None"),
    ({"indices": None}, "indices must be given with weight, got None"),
    ({"step": 0}, "step must be at least 1, got 0"),
    ({"lr": -0.1}, r"lr must be at least 0, got -0\.1"),
    ({"eps": NAN}, r"eps must be at least 0, got -?nan"),
    ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1"),
    ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1"),
    ({"beta2": NAN}, r"beta2 must be in \[0, 1\), got nan"),
]
EXCHANGE = [
    ({"change": lambda t: t[:-1]}, r"change must be \[20, 5\], got float32 \[19, 5\]"),
    ({"change": torch.Tensor.int}, r"change must be float32, .*, got int32 \[20, 5\]"),
    ({"held": lambda t: t[:, :4]}, r"held must be \[20, 5\], got float32 \[20, 4\]"),
    ({"held": half}, r"held must have weight's dtype, float32, got bfloat16 \[20, 5\]"),
    ({"held": None}, "held must be given with held_indices, got None"),
    ({"held_indices": None}, "held_indices must be given with held, got None"),
    ({"held_indices": torch.Tensor.int}, r"held_indices must be int64, got int32 \[5\]"),
    ({"held_indices": lambda t: t[:, None]}, r"held_indices must be 1-D, got int64 \[5, 1\]"),
    ({"held_indices": apart}, r"held_indices must be contiguous, got int64 \[5\] on .* with strides \[2\]"),
    ({"held_indices": lambda t: t[:4]}, r"held must be \[20, 4\], got float32 \[20, 5\]"),
    ({"original": half}, r"original must have weight's dtype, float32, got bfloat16 \[20, 5\]"),
    ({"original": lambda t: t[:4]}, r"original must be \[20, 5\], got float32 \[4, 5\]"),
    ({"original": apart}, r"original must be contiguous, got float32 \[20, 5\]"),
    ({"dim": 0}, r"change must be \[5, 24\], got float32 \[20, 5\]"),
]
BY_OPERATOR = {
    "slice_write_": [*TARGET, *WRITE],
    "slice_exchange_": [*TARGET, *EXCHANGE],
    "slice_adamw_": [*TARGET, *STEP],
}
CASES = compiled_cases((operator, *case) for operator, cases in BY_OPERATOR.items() for case in cases)


@pytest.mark.parametrize(("namespace", "device", "operator", "changes", "message"), CASES)
def test_bad_arguments_are_refused_with_nothing_changed(namespace, device, operator, changes, message):
    arguments = random_slice(device=device).arguments(operator)
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    before = {name: t.clone() for name, t in arguments.items() if isinstance(t, torch.Tensor)}
    with pytest.raises(RuntimeError, match=rf"{operator}: {message}"):
        getattr(getattr(torch.ops, namespace), operator)(*arguments.values())
    for name, tensor in before.items():
        assert_same_bits(arguments[name], tensor, name)


@pytest.mark.parametrize("place", places("slice_adamw_"))
@pytest.mark.parametrize("missing", ["weight", "indices"])
def test_nothing_is_written_back_without_knowing_where(place, missing):
    arguments = random_slice(device=place.device).arguments("slice_adamw_", **{missing: None})
    with pytest.raises((ValueError, RuntimeError), match=re.escape(f"slice_adamw_: {missing} must be given with")):
        place.kernel("slice_adamw_", torch.float32)(*arguments.values())
