"""Bad input to `lora_linear` and to the raw operators: a clear error before anything has run or changed."""

from __future__ import annotations

import re

import pytest
import torch

import peft_kernels
from peft_kernels import ops

from ..support.accuracy import assert_same_bits
from ..support.lora import random_layer
from ..support.operators import DROPPING, OPERATORS, random_call
from ..support.places import LAYER_OPERATORS, compiled_cases, compiled_places, places

NAN = float("nan")


def half(tensor):
    return tensor.bfloat16()


# What is changed about a good call (float32, x [3, 5, 24], weight [20, 24], bias [20], lora_a [4, 24], lora_b [20, 4]),
# the error, and what its message must say: the argument, what was expected, what came.
BAD_CALLS = {
    "x_of_other_width": ({"x": lambda t: t[..., :23]}, ValueError, ("x must be", "24", "got", "[3, 5, 23]")),
    "x_without_dimensions": ({"x": lambda t: t[0, 0, 0]}, ValueError, ("x must be", "24", "got", "[]")),
    "x_of_integers": ({"x": torch.Tensor.int}, TypeError, ("x must be", "float32", "got", "int32")),
    "x_complex": ({"x": lambda t: t.to(torch.complex64)}, TypeError, ("x must be", "float32", "got", "complex64")),
    "weight_vector": ({"weight": lambda t: t[0]}, ValueError, ("weight must be", "2-D", "got", "[24]")),
    "weight_batched": ({"weight": lambda t: t[None]}, ValueError, ("weight must be", "2-D", "got", "[1, 20, 24]")),
    "weight_of_other_dtype": ({"weight": half}, TypeError, ("weight must", "float32", "got", "bfloat16")),
    "weight_elsewhere": ({"weight": lambda t: t.to("meta")}, ValueError, ("weight must be on", "cpu", "got", "meta")),
    "bias_of_other_length": ({"bias": lambda t: t[:19]}, ValueError, ("bias must be", "[20]", "got", "[19]")),
    "bias_matrix": ({"bias": lambda t: t[None]}, ValueError, ("bias must be", "[20]", "got", "[1, 20]")),
    "bias_of_other_dtype": ({"bias": half}, TypeError, ("bias must", "float32", "got", "bfloat16")),
    "bias_elsewhere": ({"bias": lambda t: t.to("meta")}, ValueError, ("bias must be on", "cpu", "got", "meta")),
    "lora_a_of_other_width": ({"lora_a": lambda t: t[:, :23]}, ValueError, ("lora_a must be", "24", "got", "[4, 23]")),
    "lora_a_transposed": ({"lora_a": torch.t}, ValueError, ("lora_a must be", "24", "got", "[24, 4]")),
    "lora_a_vector": ({"lora_a": lambda t: t[0]}, ValueError, ("lora_a must be", "[r, 24]", "got", "[24]")),
    "lora_a_of_rank_zero": (
        {"lora_a": lambda t: t[:0], "lora_b": lambda t: t[:, :0]},
        ValueError,
        ("lora_a must be", "r >= 1", "got", "[0, 24]"),
    ),
    "lora_a_of_integers": ({"lora_a": torch.Tensor.int}, TypeError, ("lora_a must be", "float32", "got", "int32")),
    "lora_a_float64": ({"lora_a": torch.Tensor.double}, TypeError, ("lora_a must be", "float64", "got", "float64")),
    "lora_a_elsewhere": ({"lora_a": lambda t: t.to("meta")}, ValueError, ("lora_a must be on", "cpu", "got", "meta")),
    "lora_b_of_other_rank": ({"lora_b": lambda t: t[:, :3]}, ValueError, ("lora_b must be", "[20, 4]", "[20, 3]")),
    "lora_b_of_other_height": ({"lora_b": lambda t: t[:19]}, ValueError, ("lora_b must be", "[20, 4]", "[19, 4]")),
    "lora_b_transposed": ({"lora_b": torch.t}, ValueError, ("lora_b must be", "[20, 4]", "got", "[4, 20]")),
    "lora_b_float64": ({"lora_b": torch.Tensor.double}, TypeError, ("lora_b must be", "float64", "got", "float64")),
    "lora_b_elsewhere": ({"lora_b": lambda t: t.to("meta")}, ValueError, ("lora_b must be on", "cpu", "got", "meta")),
    "dropout_nan": ({"dropout_p": NAN}, ValueError, ("dropout_p must be", "[0, 1]", "got", "nan")),
    "dropout_negative": ({"dropout_p": -0.1}, ValueError, ("dropout_p must be", "[0, 1]", "got", "-0.1")),
    "dropout_above_one": ({"dropout_p": 1.5}, ValueError, ("dropout_p must be", "[0, 1]", "got", "1.5")),
    "dropout_infinite": ({"dropout_p": float("inf")}, ValueError, ("dropout_p must be", "[0, 1]", "got", "inf")),
}  # fmt: skip
ARGUMENTS = ("x", "weight", "bias", "lora_a", "lora_b")


def changed(layer, changes):
    arguments = {**layer.tensors(), "scaling": 1.7, "dropout_p": 0.2}
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_message_names_argument_expectation_and_what_came(case, training):
    changes, error, fragments = BAD_CALLS[case]
    arguments = changed(random_layer((3, 5)), changes)
    before = {name: arguments[name].clone() for name in ARGUMENTS}
    random_state = torch.get_rng_state()
    with pytest.raises(error) as raised:
        ops.lora_linear(*arguments.values(), training)
    message = str(raised.value)
    assert message.startswith("lora_linear: ")
    for fragment in fragments:
        assert fragment in message
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in before.items():
        if tensor.device.type != "meta":
            assert_same_bits(arguments[name], tensor, name)


def test_same_calls_without_the_change_succeed():
    arguments = changed(random_layer((3, 5)), {})
    assert ops.lora_linear(*arguments.values(), True).shape == (3, 5, 20)


@pytest.mark.parametrize("factor", ["lora_a", "lora_b"])
def test_float64_activations_ask_for_float64_factors(factor):
    layer = random_layer((3,), dtype=torch.float64)
    arguments = changed(layer, {factor: torch.Tensor.float})
    with pytest.raises(TypeError, match=rf"{factor} must be .*float64 if and only if x is.*got float32"):
        ops.lora_linear(*arguments.values(), True)


def test_tensors_without_a_kernel_are_refused_with_the_reasons():
    layer = random_layer((3,)).map(lambda tensor: tensor.to("meta"))
    with pytest.raises(peft_kernels.BackendUnavailable, match=r"no backend for torch\.float32 on meta"):
        layer()


# Raw operators, called around the Python checks: changes to a good call of random_call() with 7 rows, 24 columns, 20
# output columns and rank 4, and the argument that the message must name.
def cut(tensor):
    return tensor[:, :-1].contiguous()


def cut_rows(tensor):
    return tensor[:-1].contiguous()


SHAPES = [
    ("lora_shrink", {"factor": cut}, "factor"),
    ("lora_shrink", {"x": lambda t: t[0]}, "x"),
    ("lora_shrink", {"factor": lambda t: t[0]}, "factor"),
    ("lora_shrink", {"factor": lambda t: t[None]}, "factor"),
    ("lora_accumulate_", {"hidden": cut_rows}, "hidden"),
    ("lora_accumulate_", {"hidden": cut}, "hidden|factor"),
    ("lora_accumulate_", {"factor": cut}, "factor"),
    ("lora_accumulate_", {"out": lambda t: t[0]}, "out"),
    ("lora_accumulate_", {"hidden": lambda t: t[0]}, "hidden"),
    ("lora_matmul", {"matrix": cut_rows}, "matrix"),
    ("lora_matmul", {"matrix": cut}, "matrix|factor|bias"),
    ("lora_matmul", {"bias": lambda t: t[:-1]}, "bias"),
    ("lora_matmul", {"bias": lambda t: t[None]}, "bias"),
    ("lora_matmul", {"hidden": cut_rows}, "hidden"),
    ("lora_matmul", {"hidden": cut}, "hidden|factor"),
    ("lora_matmul", {"factor": cut}, "factor"),
    ("lora_matmul", {"x": lambda t: t[0]}, "x"),
    ("lora_factor_grad", {"hidden": cut_rows}, "hidden"),
    ("lora_factor_grad", {"hidden": lambda t: t[0]}, "hidden"),
    ("lora_factor_grad", {"x": lambda t: t[None]}, "x"),
    ("lora_grad_b", {"hidden": cut_rows}, "hidden"),
    ("lora_grad_b", {"lora_b": cut_rows}, "lora_b"),
    ("lora_grad_b", {"lora_b": cut}, "lora_b|hidden"),
    ("lora_grad_b", {"grad_out": lambda t: t[0]}, "grad_out"),
    ("lora_linear_forward", {"x": lambda t: t[0]}, "x"),
    ("lora_linear_forward", {"x": cut}, "weight"),
    ("lora_linear_forward", {"weight": cut}, "weight"),
    ("lora_linear_forward", {"weight": lambda t: t[None]}, "weight"),
    ("lora_linear_forward", {"weight": cut_rows}, "bias|lora_b"),
    ("lora_linear_forward", {"bias": lambda t: t[:-1]}, "bias"),
    ("lora_linear_forward", {"lora_a": cut}, "lora_a"),
    ("lora_linear_forward", {"lora_a": lambda t: t[:0]}, "lora_a"),
    ("lora_linear_forward", {"lora_b": cut}, "lora_b"),
    ("lora_linear_forward", {"lora_b": cut_rows}, "lora_b"),
    ("lora_linear_forward", {"lora_b": torch.t}, "lora_b"),
    ("lora_linear_backward", {"grad_out": lambda t: t[0]}, "grad_out"),
    ("lora_linear_backward", {"grad_out": cut}, "weight"),
    ("lora_linear_backward", {"x": None}, "x"),
    ("lora_linear_backward", {"x": cut}, "x"),
    ("lora_linear_backward", {"x": cut_rows}, "x"),
    ("lora_linear_backward", {"x": lambda t: t[0]}, "x"),
    ("lora_linear_backward", {"weight": cut_rows}, "weight"),
    ("lora_linear_backward", {"weight": lambda t: t[None]}, "weight"),
    ("lora_linear_backward", {"weight": cut}, "x|lora_a"),
    ("lora_linear_backward", {"lora_a": cut}, "lora_a"),
    ("lora_linear_backward", {"lora_a": lambda t: t[:0]}, "lora_a"),
    ("lora_linear_backward", {"lora_a": cut_rows}, "lora_b"),
    ("lora_linear_backward", {"lora_b": cut_rows}, "lora_b"),
    ("lora_linear_backward", {"lora_b": torch.t}, "lora_b"),
    ("lora_linear_backward", {"hidden": cut_rows}, "hidden"),
    ("lora_linear_backward", {"hidden": cut}, "hidden"),
    ("lora_linear_backward", {"hidden": lambda t: t[0]}, "hidden"),
]
DTYPES = [
    ("lora_shrink", {"x": torch.Tensor.int}, "x"),
    ("lora_shrink", {"factor": torch.Tensor.int}, "factor"),
    ("lora_shrink", {"factor": torch.Tensor.double}, "factor"),
    ("lora_accumulate_", {"out": torch.Tensor.int}, "out"),
    ("lora_accumulate_", {"hidden": half}, "hidden"),
    ("lora_accumulate_", {"hidden": torch.Tensor.double}, "hidden"),
    ("lora_accumulate_", {"factor": torch.Tensor.int}, "factor"),
    ("lora_matmul", {"matrix": half}, "matrix"),
    ("lora_matmul", {"bias": half}, "bias"),
    ("lora_matmul", {"hidden": half}, "hidden"),
    ("lora_factor_grad", {"hidden": half}, "hidden"),
    ("lora_factor_grad", {"x": torch.Tensor.int}, "x"),
    ("lora_factor_grad", {"dtype": torch.int32}, "dtype"),
    ("lora_grad_b", {"hidden": half}, "hidden"),
    ("lora_grad_b", {"grad_out": torch.Tensor.int}, "grad_out"),
    ("lora_linear_forward", {"x": torch.Tensor.int}, "x"),
    ("lora_linear_forward", {"weight": half}, "weight"),
    ("lora_linear_forward", {"bias": half}, "bias"),
    ("lora_linear_forward", {"lora_a": torch.Tensor.double}, "lora_a"),
    ("lora_linear_forward", {"lora_b": torch.Tensor.int}, "lora_b"),
    ("lora_linear_backward", {"grad_out": torch.Tensor.int}, "grad_out"),
    ("lora_linear_backward", {"x": half}, "x"),
    ("lora_linear_backward", {"weight": half}, "weight"),
    ("lora_linear_backward", {"lora_a": torch.Tensor.int}, "lora_a"),
    ("lora_linear_backward", {"lora_b": torch.Tensor.double}, "lora_b"),
    ("lora_linear_backward", {"hidden": half}, "hidden"),
]
RNG_STATES = {
    "missing": None,
    "of_floats": torch.zeros(2),
    "of_int32": torch.zeros(2, dtype=torch.int32),
    "too_short": torch.zeros(1, dtype=torch.int64),
    "too_long": torch.zeros(3, dtype=torch.int64),
    "matrix": torch.zeros(1, 2, dtype=torch.int64),
}
PROBABILITIES = (-0.1, 1.1, NAN, float("inf"))


def changed_call(device, operator, changes, dropout_p=0.0):
    call = random_call(operator, dropout_p=dropout_p, device=device)
    changes = {name: change(call.arguments[name]) if callable(change) else change for name, change in changes.items()}
    return call.map(lambda tensor: tensor, **changes)


def refusal(namespace, bad):
    """The message with which the operator refuses the call."""
    with pytest.raises((RuntimeError, TypeError, ValueError)) as raised:
        getattr(getattr(torch.ops, namespace), bad.operator)(*bad.arguments.values())
    return str(raised.value)


def assert_refused(namespace, device, operator, changes, named, dropout_p=0.0):
    bad = changed_call(device, operator, changes, dropout_p)
    before = {name: t.clone() for name, t in bad.arguments.items() if isinstance(t, torch.Tensor)}
    assert re.search(rf"{operator}: .*\b({named})\b", refusal(namespace, bad))
    for name, tensor in before.items():
        assert_same_bits(bad.arguments[name], tensor, name)


@pytest.mark.parametrize(("namespace", "device", "operator", "changes", "named"), compiled_cases([*SHAPES, *DTYPES]))
def test_raw_operators_refuse_wrong_shapes_and_dtypes(namespace, device, operator, changes, named):
    assert_refused(namespace, device, operator, changes, named)


@pytest.mark.parametrize(("namespace", "device", "operator"), compiled_cases((name,) for name in DROPPING))
@pytest.mark.parametrize("state", RNG_STATES)
def test_raw_operators_refuse_a_wrong_rng_state(namespace, device, operator, state):
    value = RNG_STATES[state]
    changes = {"rng_state": None if value is None else value.to(device)}
    assert_refused(namespace, device, operator, changes, "rng_state", dropout_p=0.5)


@pytest.mark.parametrize(("namespace", "device", "operator"), compiled_cases((name,) for name in DROPPING))
@pytest.mark.parametrize("probability", PROBABILITIES)
def test_raw_operators_refuse_what_is_no_probability(namespace, device, operator, probability):
    assert_refused(namespace, device, operator, {"dropout_p": probability}, "dropout_p", dropout_p=0.5)


@pytest.mark.parametrize(("namespace", "device", "operator"), compiled_cases((name,) for name in OPERATORS))
def test_raw_operators_say_what_came(namespace, device, operator):
    cases = [(changes, 0.0) for name, changes, _ in [*SHAPES, *DTYPES] if name == operator]
    if operator in DROPPING:
        cases += [({"rng_state": state.to(device)}, 0.5) for state in RNG_STATES.values() if state is not None]
        cases += [({"dropout_p": probability}, 0.5) for probability in PROBABILITIES]
    messages = [refusal(namespace, changed_call(device, operator, *case)) for case in cases]
    assert not [message for message in messages if ", got " not in message]


@pytest.mark.parametrize(("namespace", "device"), compiled_places("lora_accumulate_"))
@pytest.mark.parametrize("strides", [(0, 1), (1, 0), (1, 1), (12, 1), (1, 6)], ids=str)
def test_an_out_that_overlaps_itself_is_refused(namespace, device, strides):
    changes = {"out": lambda tensor: torch.ones(7 * 24, device=device).as_strided(tensor.shape, strides)}
    assert_refused(namespace, device, "lora_accumulate_", changes, "out .*must not overlap itself")


@pytest.mark.parametrize(("namespace", "device"), compiled_places("dropout_mask"))
@pytest.mark.parametrize("state", [name for name in RNG_STATES if name != "missing"])
def test_dropout_mask_refuses_a_wrong_rng_state(namespace, device, state):
    with pytest.raises(RuntimeError, match="rng_state"):
        getattr(torch.ops, namespace).dropout_mask(3, 4, 0.5, RNG_STATES[state].to(device))


@pytest.mark.parametrize(("namespace", "device"), compiled_places("dropout_mask"))
@pytest.mark.parametrize(
    ("rows", "columns", "probability", "named"),
    [(-1, 4, 0.5, "rows"), (3, -1, 0.5, "columns"), *((3, 4, p, "dropout_p") for p in PROBABILITIES)],
)
def test_dropout_mask_refuses_wrong_numbers(namespace, device, rows, columns, probability, named):
    state = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match=named):
        getattr(torch.ops, namespace).dropout_mask(rows, columns, probability, state)


@pytest.mark.parametrize("place", [param for param in places(*DROPPING) if param.values[0].backend == "reference"])
@pytest.mark.parametrize("operator", DROPPING)
def test_reference_does_not_skip_dropout_that_lacks_its_random_state(place, operator):
    call = random_call(operator, dropout_p=0.5, device=place.device)
    with pytest.raises(ValueError, match="rng_state"):
        call.map(lambda tensor: tensor, rng_state=None).run(place.kernel(operator, torch.float32))


@pytest.mark.parametrize("place", places("lora_linear_backward"))
def test_gradient_of_lora_a_is_not_made_without_x(place):
    call = random_call("lora_linear_backward", device=place.device)
    with pytest.raises((ValueError, RuntimeError), match=r"lora_linear_backward: x must be given .*, got None"):
        call.map(lambda tensor: tensor, x=None).run(place.kernel("lora_linear_backward", torch.float32))


@pytest.mark.parametrize("place", places(*LAYER_OPERATORS))
@pytest.mark.parametrize("leading", [(3,), (2, 3)], ids=str)
@pytest.mark.parametrize(("in_features", "out_features"), [(0, 4), (4, 0), (0, 0)])
def test_a_layer_without_features_works_as_in_torch(place, leading, in_features, out_features):
    layer = random_layer(leading, in_features, out_features, 2, device=place.device).training("lora_a", "lora_b")
    with peft_kernels.use_backend(place.backend):
        y = layer()
    torch.testing.assert_close(y, torch.nn.functional.linear(layer.x, layer.weight, layer.bias))
    y.sum().backward()
    assert not layer.lora_a.grad.any()
    assert not layer.lora_b.grad.any()
