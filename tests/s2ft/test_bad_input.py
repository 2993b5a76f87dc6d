"""Bad input to `s2ft_linear` and `check_channels`: what was expected and what came, before anything has run."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import ops

from ..support.s2ft_layer import random_s2ft_layer

# What is changed about a good call (float32; x [7, 24], weight [20, 24], 5 input channels), the error, the message.
CASES = [
    ({"dim": "rows"}, ValueError, "dim must be 'input' or 'output', got 'rows'"),
    ({"dim": 1}, ValueError, "dim must be 'input' or 'output', got 1"),
    ({"dim": "output"}, ValueError, r"trainable must be \[5, 24\], .* along its output, got float32 \[20, 5\] on cpu"),
    ({"weight": lambda t: t[0]}, ValueError, r"weight must be 2-D \[out_features, in_features\], got float32 \[24\]"),
    ({"weight": torch.Tensor.half}, TypeError, r"weight must have x's dtype, torch.float32, got float16 \[20, 24\]"),
    ({"x": lambda t: t[:, 1:]}, ValueError, r"x must be \[..., 24\] to match weight, got float32 \[7, 23\]"),
    ({"x": lambda t: t[0, 0]}, ValueError, r"x must be \[..., 24\] to match weight, got float32 \[\]"),
    ({"x": torch.Tensor.int}, TypeError, r"x must be float32, bfloat16, float16 or float64, got int32 \[7, 24\]"),
    ({"bias": lambda t: t[1:]}, ValueError, r"bias must be \[20\], got float32 \[19\]"),
    ({"bias": torch.Tensor.half}, TypeError, r"bias must have x's dtype, torch.float32, got float16 \[20\]"),
    ({"trainable": torch.t}, ValueError, r"trainable must be \[20, 5\], .* along its input, got float32 \[5, 20\]"),
    ({"trainable": torch.Tensor.double}, TypeError, r"trainable must be .* if and only if x is\), got float64"),
    ({"trainable": torch.Tensor.int}, TypeError, r"trainable must be float32, .*, got int32 \[20, 5\]"),
    ({"indices": torch.Tensor.int}, TypeError, r"indices must be int64, got int32 \[5\]"),
    ({"indices": lambda t: t[None]}, ValueError, r"indices must be 1-D, got int64 \[1, 5\]"),
    ({"indices": lambda t: t[1:]}, ValueError, r"trainable must be \[20, 4\], .*, got float32 \[20, 5\]"),
    ({"x_slice": torch.ones(7, 4)}, ValueError, r"x_slice must be \[7, 5\], x at indices, got float32 \[7, 4\]"),
    ({"x_slice": torch.ones(1, 7, 5)}, ValueError, r"x_slice must be \[7, 5\], .* got float32 \[1, 7, 5\]"),
    ({"x_slice": torch.ones(7, 5).half()}, TypeError, r"x_slice must have x's dtype, torch.float32, got float16"),
    *(
        ({name: lambda t: t.to("meta")}, ValueError, f"{name} must be on x's device, cpu, got .* on meta")
        for name in ("weight", "bias", "trainable", "indices")
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), CASES)
def test_message_names_argument_expectation_and_what_came(changes, error, message):
    arguments = {**vars(random_s2ft_layer("input")), "x_slice": None}
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(error, match=f"s2ft_linear: {message}"):
        ops.s2ft_linear(**arguments)


TRANSPOSED = [
    ({"transposed": False}, ValueError, r"x must be \[..., 20\] to match weight, got float32 \[7, 24\]"),
    ({"weight": lambda t: t[0]}, ValueError, r"weight must be 2-D \[in_features, out_features\], got float32 \[20\]"),
    ({"x": lambda t: t[:, 1:]}, ValueError, r"x must be \[..., 24\] to match weight, got float32 \[7, 23\]"),
    ({"bias": lambda t: t[1:]}, ValueError, r"bias must be \[20\], got float32 \[19\]"),
    ({"trainable": torch.t}, ValueError, r"trainable must be \[5, 20\], .* along its input, got float32 \[20, 5\]"),
    ({"dim": "output"}, ValueError, r"trainable must be \[24, 5\], .* along its output, got float32 \[5, 20\]"),
]


@pytest.mark.parametrize(("changes", "error", "message"), TRANSPOSED)
def test_messages_go_by_the_way_the_weight_lies(changes, error, message):
    arguments = {**vars(random_s2ft_layer("input of Conv1D")), "x_slice": None}
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(error, match=f"s2ft_linear: {message}"):
        ops.s2ft_linear(**arguments)


def test_a_slice_of_x_goes_with_input_channels():
    with pytest.raises(
        ValueError, match=r"s2ft_linear: x_slice goes with dim 'input', got float32 \[7, 5\] .* 'output'"
    ):
        random_s2ft_layer("output")(x_slice=torch.ones(7, 5))


BAD_CHANNELS = {
    "of_int32": (torch.tensor([1], dtype=torch.int32), TypeError, "indices must be int64, got int32 [1]"),
    "of_floats": (torch.tensor([1.0]), TypeError, "indices must be int64, got float32 [1]"),
    "matrix": (torch.tensor([[1, 2]]), ValueError, "indices must be 1-D, got int64 [1, 2]"),
    "strided": (torch.arange(6)[::2], ValueError, "indices must be contiguous, got int64 [3] with stride 2"),
    "too_many": (
        torch.arange(11),
        ValueError,
        "indices must be at most as many as there are channels, 10, got int64 [11]",
    ),
    "negative": (torch.tensor([-1, 3]), ValueError, "indices must be in [0, 10), got -1 at position 0"),
    "too_large": (torch.tensor([0, 3, 10]), ValueError, "indices must be in [0, 10), got 10 at position 2"),
    "unsorted": (torch.tensor([0, 7, 3, 2]), ValueError, "indices must be sorted, got 3 at position 2 after 7"),
    "twice": (torch.tensor([0, 3, 7, 7]), ValueError, "indices must be unique, got 7 at positions 2 and 3"),
}


@pytest.mark.parametrize("case", BAD_CHANNELS)
def test_indices_that_are_not_channels_are_refused(case):
    indices, error, message = BAD_CHANNELS[case]
    with pytest.raises(error) as raised:
        ops.check_channels(indices, 10)
    assert str(raised.value) == message


@pytest.mark.parametrize("indices", [[], [0], [9], [0, 9], list(range(10))], ids=str)
def test_channels_are_accepted(indices):
    ops.check_channels(torch.tensor(indices, dtype=torch.int64), 10)
