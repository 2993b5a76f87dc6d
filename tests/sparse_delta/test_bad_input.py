"""Bad input: a message that names the argument, what was expected and what came, before anything has changed."""

from __future__ import annotations

import re

import pytest
import torch

from peft_kernels.ops.sparse_delta import check_indices

from ..support.accuracy import assert_same_bits
from ..support.places import compiled_cases, places
from ..support.sparse_delta import IN_PLACE, random_delta

NAN, INF = float("nan"), float("inf")


def half(tensor):
    return tensor.bfloat16()


def short(tensor):
    return tensor[:-1]


def column(tensor):
    return tensor[:, None]


def apart(tensor):
    return torch.cat([tensor, tensor])[::2]


# What is changed about a good call (float32 and int32; weight [20, 24], 37 entries) and the message.
WEIGHT = [
    ({"weight": torch.Tensor.int}, r"weight must be float32, .*, got int32 \[20, 24\] on"),
    ({"weight": torch.t}, r"weight must be contiguous, got float32 \[24, 20\] on .* with strides \[1, 24\]"),
    ({"weight": lambda t: t[:, ::2]}, r"weight must be contiguous, got float32 \[20, 12\] on .* strides \[24, 2\]"),
    ({"weight": lambda t: t[:1, :1].expand(20, 24)}, r"weight must be contiguous, got .* with strides \[0, 0\]"),
]
INDICES = [
    ({"indices": torch.Tensor.float}, r"indices must be int32 or int64, got float32 \[37\]"),
    ({"indices": torch.Tensor.short}, r"indices must be int32 or int64, got .*Short.* \[37\]"),
    ({"indices": column}, r"indices must be 1-D, got int32 \[37, 1\]"),
    ({"indices": lambda t: t[0]}, r"indices must be 1-D, got int32 \[\]"),
    ({"indices": apart}, r"indices must be contiguous, got int32 \[37\] on .* with strides \[2\]"),
    ({"weight": lambda t: t[:1]}, r"indices must be at most as many as weight has elements, 24, got int32 \[37\]"),
]
ORIGINAL = [
    ({"original": short}, r"original must be \[37\], as many as the others, got float32 \[36\]"),
    ({"original": column}, r"original must be \[37\], as many as the others, got float32 \[37, 1\]"),
    ({"original": half}, r"original must have weight's dtype, float32, got bfloat16 \[37\]"),
]
VALUES = [
    ({"values": short}, r"values must be \[37\], as many as the others, got float32 \[36\]"),
    ({"values": column}, r"values must be \[37\], as many as the others, got float32 \[37, 1\]"),
    ({"values": torch.Tensor.int}, r"values must be float32, .*, got int32 \[37\]"),
]
STATE = [
    case
    for name in ("grad", "exp_avg", "exp_avg_sq")
    for case in (
        ({name: short}, rf"{name} must be \[37\], as many as the others, got float32 \[36\]"),
        ({name: column}, rf"{name} must be \[37\], as many as the others, got float32 \[37, 1\]"),
        ({name: half}, rf"{name} must have values' dtype, float32, got bfloat16 \[37\]"),
        ({name: apart}, rf"{name} must be contiguous, got float32 \[37\] on .* with strides \[2\]"),
    )
]
ADAMW = [
    ({"values": column}, r"values must be 1-D, got float32 \[37, 1\]"),
    ({"values": apart}, r"values must be contiguous, got float32 \[37\] on .* with strides \[2\]"),
    ({"values": torch.Tensor.int}, r"values must be float32, .*, got int32 \[37\]"),
    ({"values": short}, r"grad must be \[36\], as many as the others, got float32 \[37\]"),
    ({"indices": short}, r"indices must be \[37\], as many as values, got int32 \[36\]"),
    ({"weight": None}, r"weight must be given with indices and original, got None"),
    ({"weight": None, "indices": None}, r"weight must be given with indices and original, got None"),
    ({"indices": None}, r"indices must be given with weight, got None"),
    ({"original": None}, r"original must be given with weight, got None"),
    ({"step": 0}, r"step must be at least 1, got 0"),
    ({"step": -3}, r"step must be at least 1, got -3"),
    *(({name: -0.1}, rf"{name} must be at least 0, got -0\.1") for name in ("lr", "eps", "weight_decay")),
    *(({name: NAN}, rf"{name} must be at least 0, got -?nan") for name in ("lr", "eps", "weight_decay")),
    *(
        ({name: value}, rf"{name} must be in \[0, 1\), got {re.escape(text)}")
        for name in ("beta1", "beta2")
        for value, text in ((-0.1, "-0.1"), (1.0, "1"), (1.5, "1.5"), (NAN, "nan"), (INF, "inf"))
    ),
]  # fmt: skip
SM3 = [
    ({"values": column}, r"values must be 1-D, got float32 \[37, 1\]"),
    ({"values": apart}, r"values must be contiguous, got float32 \[37\] on .* with strides \[2\]"),
    ({"values": torch.Tensor.int}, r"values must be float32, .*, got int32 \[37\]"),
    ({"indices": short}, r"indices must be \[37\], as many as values, got int32 \[36\]"),
    ({"original": None}, r"original must be given with weight, got None"),
    ({"weight": None}, r"weight must be given with original, got None"),
    ({"row_max": lambda t: t[:1]}, r"indices must be at most N K = 24 positions, got int32 \[37\]"),
    ({"row_max": short}, r"weight must have N K = 456 elements, as row_max and .* say, got float32 \[20, 24\]"),
    *(
        case
        for name, size in (("row_max", 20), ("column_max", 24))
        for case in (
            ({name: column}, rf"{name} must be 1-D, got float32 \[{size}, 1\]"),
            ({name: half}, rf"{name} must have values' dtype, float32, got bfloat16 \[{size}\]"),
            ({name: apart}, rf"{name} must be contiguous, got float32 \[{size}\] on .* with strides \[2\]"),
        )
    ),
    *(({name: -0.1}, rf"{name} must be at least 0, got -0\.1") for name in ("lr", "eps", "weight_decay")),
    *(({name: NAN}, rf"{name} must be at least 0, got -?nan") for name in ("lr", "eps", "weight_decay")),
    *(({"beta": value}, r"beta must be in \[0, 1\), got") for value in (-0.1, 1.0, NAN)),
]  # fmt: skip
# What the state of one optimizer shares with that of the other, and messages that say N K instead.
SM3_STATE = [case for case in STATE if "exp_avg_sq" not in case[0]]
SM3_TARGET = [case for case in (*WEIGHT, *INDICES, *ORIGINAL) if "at most as many" not in case[1]]
BY_OPERATOR = {
    "scatter_write_": [*WEIGHT, *INDICES, *ORIGINAL, *VALUES],
    "scatter_accumulate_": [*WEIGHT, *INDICES, *VALUES],
    "sparse_adamw_": [*WEIGHT, *INDICES, *ORIGINAL, *STATE, *ADAMW],
    "sparse_sm3_": [*SM3_TARGET, *SM3_STATE, *SM3],
}
CASES = compiled_cases((operator, *case) for operator, cases in BY_OPERATOR.items() for case in cases)


@pytest.mark.parametrize(("namespace", "device", "operator", "changes", "message"), CASES)
def test_message_names_argument_expectation_and_what_came(namespace, device, operator, changes, message):
    arguments = random_delta(device=device).arguments(operator)
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    before = {name: t.clone() for name, t in arguments.items() if isinstance(t, torch.Tensor)}
    with pytest.raises(RuntimeError, match=rf"{operator}: {message}"):
        getattr(getattr(torch.ops, namespace), operator)(*arguments.values())
    for name, tensor in before.items():
        assert_same_bits(arguments[name], tensor, name)


@pytest.mark.parametrize(("namespace", "device", "operator"), compiled_cases((name,) for name in IN_PLACE))
def test_same_calls_without_the_change_succeed(namespace, device, operator):
    arguments = random_delta(device=device).arguments(operator)
    assert getattr(getattr(torch.ops, namespace), operator)(*arguments.values()) is None


@pytest.mark.parametrize("place", places("sparse_adamw_"))
@pytest.mark.parametrize("missing", ["indices", "original"])
def test_nothing_is_written_back_without_knowing_where(place, missing):
    delta = random_delta(device=place.device)
    arguments = delta.arguments("sparse_adamw_", **{missing: None})
    with pytest.raises((ValueError, RuntimeError), match=r"sparse_adamw_: .*must be given with weight, got None"):
        place.kernel("sparse_adamw_", torch.float32)(*arguments.values())


BAD_INDICES = {
    "of_floats": (torch.tensor([1.0]), TypeError, "indices must be int32 or int64, got float32 [1]"),
    "of_bytes": (torch.tensor([1], dtype=torch.uint8), TypeError, "indices must be int32 or int64, got uint8 [1]"),
    "matrix": (torch.tensor([[1, 2]]), ValueError, "indices must be 1-D, got int64 [1, 2]"),
    "number": (torch.tensor(1), ValueError, "indices must be 1-D, got int64 []"),
    "strided": (torch.arange(6)[::2], ValueError, "indices must be contiguous, got int64 [3] with stride 2"),
    "too_many": (
        torch.arange(11),
        ValueError,
        "indices must be at most as many as the weight has elements, 10, got int64 [11]",
    ),
    "negative": (torch.tensor([-1, 3]), ValueError, "indices must be in [0, 10), got -1 at position 0"),
    "too_large": (torch.tensor([0, 3, 10]), ValueError, "indices must be in [0, 10), got 10 at position 2"),
    "unsorted": (torch.tensor([0, 7, 3, 2]), ValueError, "indices must be sorted, got 3 at position 2 after 7"),
    "twice": (torch.tensor([0, 3, 7, 7]), ValueError, "indices must be unique, got 7 at positions 2 and 3"),
}


@pytest.mark.parametrize("case", BAD_INDICES)
def test_indices_that_are_not_positions_are_refused(case):
    indices, error, message = BAD_INDICES[case]
    with pytest.raises(error) as raised:
        check_indices(indices, 10)
    assert str(raised.value) == message


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("indices", [[], [0], [9], [0, 9], list(range(10))], ids=str)
def test_positions_are_accepted(indices, dtype):
    check_indices(torch.tensor(indices, dtype=dtype), 10)
