"""`slice_grad` and `gather_columns` on Triton: tiles, either way to the channels, splits, strides, bad input."""

from __future__ import annotations

import inspect

import pytest
import torch
from peft_kernels.triton_kernels import s2ft

from peft_kernels.reference import s2ft as reference

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import laid_out

# M, columns of grad_out, of x, and how many of grad_out's are channels; None: all. Around tiles of 64 and 128.
SIZES = [
    (1, 1, 1, None), (0, 5, 4, None), (0, 5, 4, 2), (3, 5, 0, 2), (3, 0, 5, None), (3, 5, 2, 0), (40, 300, 20, None),
    (70, 130, 65, None), (33, 20, 300, None), (33, 260, 260, None), (20, 400, 37, 300), (70, 300, 129, 150),
    (65, 90, 400, 33), (65, 90, 520, 90),
]  # fmt: skip
FEW, MANY = 60, 400
"""Columns of x with which channels are gathered in the load, and into a copy first."""


def operands(m, a, b, channels, dtype, device, integers=False):
    generator = torch.Generator().manual_seed(0)
    if integers:
        dy, x = (torch.randint(-2, 3, (m, c), generator=generator) for c in (a, b))
    else:
        dy, x = (torch.randn(m, c, generator=generator) for c in (a, b))
    indices = None if channels is None else torch.randperm(a, generator=generator)[:channels].sort().values.to(device)
    return dy.to(dtype).to(device), x.to(dtype).to(device), indices


def check(call, dtype):
    found = s2ft.slice_grad(*call, dtype)
    assert found.dtype == dtype and found.is_contiguous()
    dy, x, indices = call
    exact = reference.slice_grad(dy.double(), x.double(), indices, torch.float64)
    assert_accurate(found, reference.slice_grad(*call, dtype), exact, "slice_grad")
    return found


@pytest.mark.parametrize("operator", s2ft.LAUNCHERS)
def test_launchers_have_the_operators_arguments(operator):
    schema = getattr(torch.ops.peft_kernels, operator).default._schema
    parameters = inspect.signature(s2ft.LAUNCHERS[operator]).parameters
    assert [argument.name for argument in schema.arguments] == list(parameters)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(place, dtype, sizes):
    check(operands(*sizes, dtype, place.device), torch.float32)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_integers_give_exact_sums(place, dtype, sizes):
    dy, x, indices = operands(*sizes, dtype, place.device, integers=True)
    exact = reference.slice_grad(dy.double(), x.double(), indices, torch.float32)
    assert_same_bits(s2ft.slice_grad(dy, x, indices, torch.float32) + 0.0, exact + 0.0)


def test_the_result_comes_in_the_dtype_asked_for(place, half):
    for columns in (FEW, MANY):
        call = operands(40, 90, columns, 30, half, place.device)
        assert_same_bits(check(call, half), s2ft.slice_grad(*call, torch.float32).to(half))


def test_channels_are_gathered_in_the_load_for_few_columns_and_once_for_many(place, dtype, launched):
    for columns, kernels in ((FEW, {"slice_grad_kernel"}), (MANY, {"gather_columns_kernel", "slice_grad_kernel"})):
        launched.clear()
        check(operands(20, 90, columns, 30, dtype, place.device), torch.float32)
        assert {name for name, _ in launched} == kernels


@pytest.mark.parametrize(("narrow", "copies"), [(32, False), (37, True)])
def test_a_narrow_operand_is_copied_only_where_its_rows_cannot_be_read_wide(place, dtype, launched, narrow, copies):
    check(operands(20, 400, narrow, None, dtype, place.device), torch.float32)
    assert ("gather_columns_kernel" in [name for name, _ in launched]) == copies


@pytest.mark.parametrize(("sizes", "channels"), [((FEW, 30), 7), ((MANY, 30), None), ((MANY, 30), 25)], ids=str)
def test_long_sums_are_split_and_finished_in_one_order(place, dtype, launched, sizes, channels):
    a, b = sizes
    call = operands(600, a, b, channels, dtype, place.device)
    found = check(call, torch.float32)
    names = [name for name, _ in launched]
    assert names[-2:] == ["slice_grad_kernel", "sum_partials_kernel"]
    assert dict(launched)["slice_grad_kernel"][2] > 1
    assert_same_bits(s2ft.slice_grad(*call, torch.float32), found)


@pytest.mark.parametrize("layout", ["transposed", "every_other", "offset", "padded"])
@pytest.mark.parametrize("columns", [FEW, MANY])
@pytest.mark.parametrize("channels", [None, 32, 7])
def test_strides(place, dtype, layout, columns, channels):
    dy, x, indices = operands(37, 48, columns, channels, dtype, place.device)
    found = s2ft.slice_grad(laid_out(dy, layout), laid_out(x, layout), indices, torch.float32)
    assert_same_bits(found, s2ft.slice_grad(dy, x, indices, torch.float32))


@pytest.mark.parametrize("columns", [FEW, MANY])
def test_what_is_not_finite_stays_with_its_channel(place, dtype, columns):
    dy, x, indices = operands(37, 48, columns, 20, dtype, place.device)
    others = torch.ones(48, dtype=torch.bool, device=place.device).index_fill(0, indices, False)
    clean = s2ft.slice_grad(dy, x, indices, torch.float32)
    dy[:, others] = float("nan")
    assert_same_bits(s2ft.slice_grad(dy, x, indices, torch.float32), clean)
    dy[3, indices[5]] = float("nan")
    found = s2ft.slice_grad(dy, x, indices, torch.float32)
    assert found[5].isnan().all() and int(found.isnan().sum()) == columns


@pytest.mark.parametrize("size", [(0, 5, 2), (3, 5, 0), (1, 1, 1), (37, 45, 7), (20, 300, 150)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every_other", "offset"])
def test_gathered_columns_are_exact(place, dtype, size, layout):
    m, k, s = size
    x = laid_out(torch.randn(m, k, device=place.device).to(dtype), layout)
    indices = torch.randperm(k)[:s].sort().values.to(place.device)
    found = s2ft.gather_columns(x, indices)
    assert found.is_contiguous()
    assert_same_bits(found, x[:, indices])


BAD = {
    "grad_out_vector": ("slice_grad", {"grad_out": lambda t: t[0]}, "grad_out must be 2-D, got float32 [20]"),
    "grad_out_float64": (
        "slice_grad",
        {"grad_out": torch.Tensor.double},
        "grad_out must be float32, bfloat16 or float16, got float64",
    ),
    "x_of_other_rows": ("slice_grad", {"x": lambda t: t[1:]}, "x must be [9, B], got float32 [8, 30]"),
    "x_of_other_dtype": (
        "slice_grad",
        {"x": torch.Tensor.half},
        "x must have the activations' dtype, float32, got float16",
    ),
    "x_elsewhere": ("slice_grad", {"x": lambda t: t.to("meta")}, "x must be on "),
    "indices_int32": ("slice_grad", {"indices": torch.Tensor.int}, "indices must be int64, got int32 [5]"),
    "indices_matrix": ("slice_grad", {"indices": lambda t: t[None]}, "indices must be 1-D, got int64 [1, 5]"),
    "indices_strided": ("slice_grad", {"indices": lambda t: t[::2]}, "indices must be contiguous, got int64 [3]"),
    "indices_elsewhere": ("slice_grad", {"indices": lambda t: t.to("meta")}, "indices must be on "),
    "too_many": (
        "slice_grad",
        {"indices": lambda t: t.repeat(5)},
        "indices must be at most as many as there are channels, 20, got int64 [25]",
    ),
    "dtype": ("slice_grad", {"dtype": lambda _: torch.int32}, "dtype must be float32, bfloat16 or float16, got int32"),
    "gathered_vector": ("gather_columns", {"x": lambda t: t[0]}, "x must be 2-D, got float32 [30]"),
    "gathered_int32": ("gather_columns", {"indices": torch.Tensor.int}, "indices must be int64, got int32 [5]"),
}


@pytest.mark.parametrize(("operator", "change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_and_launches_nothing(place, launched, operator, change, message):
    dy, x, indices = operands(9, 20, 30, 5, torch.float32, place.device)
    arguments = {"grad_out": dy, "x": x, "indices": indices, "dtype": torch.float32}
    if operator == "gather_columns":
        arguments = {"x": x, "indices": indices}
    for name, function in change.items():
        arguments[name] = function(arguments[name])
    with pytest.raises(RuntimeError) as error:
        s2ft.LAUNCHERS[operator](*arguments.values())
    assert str(error.value).startswith(f"{operator}: ") and message in str(error.value)
    assert launched == []
