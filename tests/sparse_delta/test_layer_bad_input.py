"""Bad input to `sparse_delta_linear`: a clear error before anything has run or changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import peft_kernels
from peft_kernels.ops import check_indices

from ..support.accuracy import assert_same_bits
from ..support.sparse_layer import random_sparse_layer


def half(tensor):
    return tensor.bfloat16()


def elsewhere(tensor):
    return tensor.to("meta")


# What is changed about a good call (float32, x [3, 5, 24], weight [20, 24], bias [20], 37 entries), the error, and what
# its message must say: the argument, what was expected, what came.
BAD_CALLS = {
    "x_of_other_width": ({"x": lambda t: t[..., :23]}, ValueError, ("x must be [..., 24]", "got", "[3, 5, 23]")),
    "x_without_dimensions": ({"x": lambda t: t[0, 0, 0]}, ValueError, ("x must be [..., 24]", "got", "[]")),
    "x_of_integers": ({"x": torch.Tensor.int}, TypeError, ("x must be float32", "got int32")),
    "weight_vector": ({"weight": lambda t: t[0]}, ValueError, ("weight must be 2-D", "got", "[24]")),
    "weight_batched": ({"weight": lambda t: t[None]}, ValueError, ("weight must be 2-D", "got", "[1, 20, 24]")),
    "weight_of_other_dtype": ({"weight": half}, TypeError, ("weight must have x's dtype", "float32", "got bfloat16")),
    "weight_elsewhere": ({"weight": elsewhere}, ValueError, ("weight must be on x's device, cpu", "got", "meta")),
    "bias_of_other_length": ({"bias": lambda t: t[:19]}, ValueError, ("bias must be [20]", "got", "[19]")),
    "bias_of_other_dtype": ({"bias": half}, TypeError, ("bias must have x's dtype", "got bfloat16")),
    "bias_elsewhere": ({"bias": elsewhere}, ValueError, ("bias must be on x's device, cpu", "got", "meta")),
    "values_of_integers": ({"values": torch.Tensor.int}, TypeError, ("values must be float32", "got int32")),
    "values_float64": ({"values": torch.Tensor.double}, TypeError, ("values must be", "float64 if and only if", "got")),
    "values_too_few": ({"values": lambda t: t[:-1]}, ValueError, ("values and indices must be", "[36]", "[37]")),
    "values_matrix": ({"values": lambda t: t[None]}, ValueError, ("values and indices must be 1-D", "[1, 37]")),
    "values_elsewhere": ({"values": elsewhere}, ValueError, ("values must be on x's device, cpu", "got", "meta")),
    "indices_of_floats": ({"indices": torch.Tensor.float}, TypeError, ("indices must be int32 or int64", "float32")),
    "indices_matrix": (
        {"indices": lambda t: t[None], "values": lambda t: t[None]},
        ValueError,
        ("values and indices must be 1-D", "int32 [1, 37]"),
    ),
    "indices_elsewhere": ({"indices": elsewhere}, ValueError, ("indices must be on x's device, cpu", "got", "meta")),
    "original_too_long": ({"original": lambda t: torch.zeros(38)}, ValueError, ("original must be [37]", "[38]")),
    "original_of_other_dtype": (
        {"original": lambda t: torch.zeros(37).half()},
        TypeError,
        ("original must have weight's dtype", "float32", "got float16"),
    ),
    "original_elsewhere": (
        {"original": lambda t: torch.zeros(37, device="meta")},
        ValueError,
        ("original must be on x's device, cpu", "got", "meta"),
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_message_names_argument_expectation_and_what_came(case):
    changes, error, parts = BAD_CALLS[case]
    layer = random_sparse_layer((3, 5)).training("x", "values")
    bad = replace(layer, **{k: change(getattr(layer, k).detach()) for k, change in changes.items() if k != "original"})
    options = {"original": changes["original"](None)} if "original" in changes else {}
    before = {name: tensor.detach().clone() for name, tensor in layer.tensors().items()}
    with pytest.raises(error) as raised:
        bad(**options)
    message = str(raised.value)
    assert message.startswith("sparse_delta_linear: ") and all(part in message for part in parts), message
    for name, tensor in layer.tensors().items():
        assert_same_bits(tensor.detach(), before[name], name)


def test_float64_activations_ask_for_float64_values():
    layer = random_sparse_layer(dtype=torch.float64)
    with pytest.raises(TypeError, match=r"values must be .*float64 if and only if x is.*got float32"):
        replace(layer, values=layer.values.float())()


@pytest.mark.parametrize("leading", [(3,), (2, 3)], ids=str)
@pytest.mark.parametrize(("in_features", "out_features"), [(0, 4), (4, 0), (0, 0)])
def test_a_layer_without_features_works_as_in_torch(leading, in_features, out_features):
    layer = random_sparse_layer(leading, in_features, out_features, 0).training("values")
    y = layer()
    torch.testing.assert_close(y, torch.nn.functional.linear(layer.x, layer.weight, layer.bias))
    y.sum().backward()
    assert layer.values.grad.shape == (0,)


def test_a_backend_that_cannot_is_named():
    layer = random_sparse_layer().training("values")
    with peft_kernels.use_backend("triton"):
        y = layer()
    with pytest.raises(peft_kernels.BackendUnavailable, match=r"sampled_product.*triton"):
        y.sum().backward()


# Positions of int32 in a weight with more elements than int32 can count.
@pytest.mark.parametrize("numel", [2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, 2**32 + 5, 5 * 10**9])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_in_weights_beyond_int32(numel, dtype):
    last = min(numel, 2**31) - 1
    check_indices(torch.tensor([0, 7, last], dtype=dtype), numel)
    with pytest.raises(ValueError, match=r"indices must be in \[0, .*got -1 at position 0"):
        check_indices(torch.tensor([-1, last], dtype=dtype), numel)
    if dtype == torch.int64:
        check_indices(torch.tensor([numel - 1]), numel)
        with pytest.raises(ValueError, match=rf"indices must be in \[0, {numel}\), got {numel} at position 1"):
            check_indices(torch.tensor([5, numel]), numel)
