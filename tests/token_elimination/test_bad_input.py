"""Bad input to the public functions: what was expected and what came, before anything has run."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import ops


def good(operator):
    """A call that works: M = 8 rows of 6, 3 of them kept, two heads of 4."""
    rows = torch.tensor([1, 4, -1], dtype=torch.int32)
    x, values = torch.ones(2, 4, 6), torch.ones(3, 6)
    return {
        "gather_rows": {"x": x, "rows": rows},
        "scatter_add_rows": {"residual": x, "values": values, "rows": rows, "in_place": False},
        "split_rms_norm": {"x": x, "rows": rows, "weight": torch.ones(6), "eps": 1e-5, "owned": False},
        "rope_rows": {"x": torch.ones(3, 2, 4), "cos": torch.ones(8, 4), "sin": torch.ones(8, 4), "rows": rows},
        "gather_linear_scatter": {
            "x": x,
            "weight": torch.ones(5, 6),
            "bias": torch.ones(5),
            "indices": rows,
            "residual": torch.ones(2, 4, 5),
            "in_place": False,
        },
        "swiglu": {"gate": torch.ones(3, 4), "up": torch.ones(3, 4)},
    }[operator]


# What is changed about it, the error, the message.
CASES = [
    ("gather_rows", {"x": lambda t: t[0, 0]}, ValueError, r"x must have at least 2 dimensions, got float32 \[6\]"),
    ("gather_rows", {"x": torch.Tensor.int}, TypeError, r"x must be float32, .*, got int32 \[2, 4, 6\]"),
    ("gather_rows", {"rows": torch.Tensor.long}, TypeError, r"rows must be int32, got int64 \[3\]"),
    ("gather_rows", {"rows": lambda t: t[None]}, ValueError, r"rows must be 1-D, got int32 \[1, 3\]"),
    ("gather_rows", {"rows": lambda t: t.to("meta")}, ValueError, r"rows must be on cpu .*, got .* on meta"),
    ("scatter_add_rows", {"values": lambda t: t[:, 1:]}, ValueError, r"values must be \[..., 6\] .* \[3, 5\]"),
    ("scatter_add_rows", {"values": lambda t: t[1:]}, ValueError, r"values must be .* rows \[3\], got .* \[2, 6\]"),
    ("scatter_add_rows", {"values": torch.Tensor.half}, TypeError, r"values must have residual's dtype, .* float16"),
    (
        "scatter_add_rows",
        {"residual": lambda t: t.transpose(0, 1), "in_place": lambda _: True},
        ValueError,
        "residual must be contiguous to be changed in place",
    ),
    ("split_rms_norm", {"weight": lambda t: t[1:]}, ValueError, r"weight must be \[6\], .*, got float32 \[5\]"),
    ("split_rms_norm", {"rows": lambda _: None, "owned": lambda _: True}, ValueError, "owned needs rows"),
    ("rope_rows", {"x": lambda t: t[0]}, ValueError, r"x must have at least 3 dimensions, got float32 \[2, 4\]"),
    ("rope_rows", {"cos": lambda t: t[:, 1:]}, ValueError, r"cos must be \[P, R\] with R even .*, got .* \[8, 3\]"),
    ("rope_rows", {"sin": lambda t: t[1:]}, ValueError, r"sin must be like cos, .*, got float32 \[7, 4\]"),
    ("rope_rows", {"rows": lambda t: t[1:]}, ValueError, r"x must have 2 tokens like rows, got float32 \[3, 2, 4\]"),
    ("rope_rows", {"rows": lambda _: None}, ValueError, r"x must have 8 tokens like cos, got float32 \[3, 2, 4\]"),
    ("gather_linear_scatter", {"indices": torch.Tensor.long}, TypeError, r"indices must be int32, got int64 \[3\]"),
    ("gather_linear_scatter", {"weight": lambda t: t[0]}, ValueError, r"weight must be \[N, 6\] .*, got float32 \[6\]"),
    ("gather_linear_scatter", {"weight": torch.Tensor.half}, TypeError, r"weight must have x's dtype, .*, got float16"),
    ("gather_linear_scatter", {"bias": lambda t: t[1:]}, ValueError, r"bias must be \[5\] .*, got float32 \[4\]"),
    ("gather_linear_scatter", {"bias": torch.Tensor.half}, TypeError, r"bias must have x's dtype, .*, got float16"),
    (
        "gather_linear_scatter",
        {"residual": lambda t: t[:, 1:]},
        ValueError,
        r"residual must be \[2, 4, 5\] .*, got float32 \[2, 3, 5\]",
    ),
    ("gather_linear_scatter", {"residual": torch.Tensor.half}, TypeError, r"residual must have x's dtype, .* float16"),
    (
        "gather_linear_scatter",
        {"residual": lambda _: None, "in_place": lambda _: True},
        ValueError,
        "residual must be given to be changed in place, got None",
    ),
    (
        "gather_linear_scatter",
        {"residual": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), "in_place": lambda _: True},
        ValueError,
        r"residual must be contiguous to be changed in place, got float32 \[2, 4, 5\]",
    ),
    ("swiglu", {"up": lambda t: t[1:]}, ValueError, r"up must be \[3, 4\] like gate, got float32 \[2, 4\]"),
    ("swiglu", {"up": torch.Tensor.half}, TypeError, r"up must have gate's dtype, torch.float32, got float16"),
    ("swiglu", {"gate": lambda t: t[0, 0]}, ValueError, r"gate must be \[..., K\], got float32 \[\]"),
]


@pytest.mark.parametrize(("operator", "changes", "error", "message"), CASES)
def test_message_names_argument_expectation_and_what_came(operator, changes, error, message):
    arguments = good(operator)
    getattr(ops, operator)(**arguments)
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(error, match=f"{operator}: {message}"):
        getattr(ops, operator)(**arguments)
    for name, value in before.items():
        if value.device.type == "cpu":
            assert torch.equal(arguments[name], value)


def leaf(*shape):
    return torch.zeros(shape, requires_grad=True)


def own(*shape):
    """What is no leaf."""
    return leaf(*shape) * 1


@torch.no_grad()
def without_graph(tensor):
    return tensor[:8]


@torch.inference_mode()
def inferred(*shape):
    return torch.zeros(shape)


# A residual that autograd lets nobody change, and what the message calls it.
UNCHANGEABLE = {
    "leaf": (lambda: leaf(8, 6), "neither a leaf that requires grad nor a view of one"),
    "view of a leaf": (lambda: leaf(9, 6)[:8], "neither a leaf that requires grad nor a view of one"),
    "view of a view": (lambda: leaf(9, 6)[:8].view(2, 4, 6), "neither a leaf that requires grad nor a view of one"),
    "view under no_grad": (lambda: without_graph(own(9, 6)), "neither a leaf that requires grad nor a view of one"),
    "one of several": (lambda: own(2, 8, 6).unbind(0)[0], "no view made under no_grad, by a Function or beside others"),
    "inference": (lambda: inferred(8, 6), "not be an inference tensor"),
}


@pytest.mark.parametrize("kind", UNCHANGEABLE)
def test_a_residual_that_cannot_be_changed_is_not(kind):
    residual, message = UNCHANGEABLE[kind][0](), UNCHANGEABLE[kind][1]
    arguments = good("scatter_add_rows") | {"residual": residual, "in_place": True}
    with pytest.raises(ValueError, match=f"scatter_add_rows: residual must .*{message}"):
        ops.scatter_add_rows(**arguments)
    assert not residual.any()
    with pytest.raises(ValueError, match=f"split_rms_norm: x must .*{message}"):
        ops.split_rms_norm(**good("split_rms_norm") | {"x": residual, "owned": True})


@pytest.mark.parametrize("make", [lambda: own(8, 6), lambda: own(9, 6)[:8], lambda: leaf(8, 6).detach()])
def test_any_other_residual_is_changed(make):
    residual = make()
    ops.scatter_add_rows(**good("scatter_add_rows") | {"residual": residual, "in_place": True})
    assert residual.sum() == 12
    with torch.no_grad():
        ops.scatter_add_rows(**good("scatter_add_rows") | {"residual": residual, "in_place": True})
    assert residual.sum() == 24


@pytest.mark.parametrize("autocast", [False, True])
def test_a_residual_that_is_x_is_not_changed_in_place(autocast):
    arguments = good("gather_linear_scatter")
    x = arguments["residual"] = arguments["x"]
    square = {"weight": torch.ones(6, 6), "bias": None, "in_place": True}
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(ValueError, match="gather_linear_scatter: residual must not be x to be changed in place"),
    ):
        ops.gather_linear_scatter(**{**arguments, **square})
    assert torch.equal(x, torch.ones(2, 4, 6))


def test_gathered_rows_are_as_many_as_indices():
    arguments = good("gather_linear_scatter")
    message = r"gather_linear_scatter: x must have a row for each of indices \[3\], got float32 \[2, 4, 6\]"
    with pytest.raises(ValueError, match=message):
        ops.gather_linear_scatter(**arguments, gathered=True)
