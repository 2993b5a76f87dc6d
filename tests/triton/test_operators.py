"""Every launcher against the formulas in float64, by the accuracy rule, at sizes off the tiles."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from peft_kernels.triton_kernels import lora

from peft_kernels import backends

from ..support.accuracy import assert_same_bits
from ..support.layouts import laid_out
from ..support.operators import ACTIVATIONS, DROPPING, OPERATORS, check_call, formula, random_call, result_dtypes

EACH = pytest.mark.parametrize("operator", OPERATORS)
LAUNCHERS = {**lora.LAUNCHERS, "lora_matmul": lora.fused_matmul}
"""The fused kernel for every dtype; `test_layer.py` covers the launcher that chooses."""


def check(call, dtype):
    check_call(call, LAUNCHERS[call.operator], dtype)


def dropout_of(operator):
    return 0.25 if operator in DROPPING else 0.0


def test_every_operator_has_a_launcher_with_its_arguments():
    assert set(lora.LAUNCHERS) == {*OPERATORS, "dropout_mask"}
    for operator, launcher in lora.LAUNCHERS.items():
        schema = getattr(torch.ops.peft_kernels, operator).default._schema
        assert [argument.name for argument in schema.arguments] == list(inspect.signature(launcher).parameters)


def test_float64_is_refused(place):
    with pytest.raises(backends.BackendUnavailable, match="does not take float64"):
        place.kernel("lora_shrink", torch.float64)


@EACH
@pytest.mark.parametrize(
    ("rows", "columns", "out_columns"), [(1, 1, 1), (3, 5, 2), (64, 128, 64), (65, 131, 70), (129, 17, 259)]
)
def test_sizes(operator, place, dtype, rows, columns, out_columns):
    sizes = {"rows": rows, "columns": columns, "out_columns": out_columns}
    check(random_call(operator, **sizes, dtype=dtype, dropout_p=dropout_of(operator), device=place.device), dtype)


@EACH
@pytest.mark.parametrize("rank", [1, 5, 16, 33, 65, 130])
def test_ranks(operator, place, dtype, rank):
    call = random_call(operator, rows=19, columns=43, out_columns=37, rank=rank, dtype=dtype, device=place.device)
    check(call, dtype)


@EACH
@pytest.mark.parametrize("sizes", [{"rows": 0}, {"columns": 0}, {"out_columns": 0}], ids=str)
def test_empty_inputs_give_zeros_or_nothing(operator, place, dtype, sizes):
    call = random_call(operator, **sizes, integers=True, dtype=dtype, device=place.device)
    results = call.run(LAUNCHERS[operator])
    for actual, exact, promised in zip(results, formula(call, torch.float64), result_dtypes(call), strict=True):
        assert actual.dtype == promised
        assert torch.equal(actual.double(), exact)


@EACH
@pytest.mark.parametrize("layout", ["transposed", "every_other", "offset"])
def test_strides(operator, place, dtype, layout):
    sizes = {"rows": 21, "columns": 45, "out_columns": 26, "rank": 5}
    call = random_call(operator, **sizes, dtype=dtype, dropout_p=dropout_of(operator), device=place.device)
    check(call.map(lambda tensor: laid_out(tensor, layout)), dtype)


@EACH
def test_expanded_gradients(operator, place, dtype):
    name = "hidden" if operator == "lora_accumulate_" else ACTIVATIONS[operator]
    call = random_call(operator, rows=9, columns=20, out_columns=20, dtype=dtype, device=place.device)
    tensor = call.arguments[name]
    check(call.map(lambda t: t, **{name: tensor[:1, :1].expand_as(tensor)}), dtype)


@EACH
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_factors_of_their_own_dtype(operator, place, dtype, factor_dtype, transposed):
    call = random_call(
        operator, rows=21, columns=70, out_columns=35, rank=8, dtype=dtype, factor_dtype=factor_dtype,
        dropout_p=dropout_of(operator), transposed=transposed, bias=not transposed, device=place.device,
    )  # fmt: skip
    check(call, dtype)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_the_gradients_that_are_needed_are_made(needs, place, dtype):
    call = random_call("lora_linear_backward", dtype=dtype, dropout_p=0.25, needs=needs, device=place.device)
    check(call, dtype)
    if not call.arguments["need_a"]:
        check(call.map(lambda tensor: tensor, x=None), dtype)


@EACH
def test_nothing_beside_the_result_is_written(operator, place, dtype):
    call = random_call(operator, dtype=dtype, dropout_p=dropout_of(operator), device=place.device)
    before = call.map(torch.clone)
    LAUNCHERS[operator](*call.arguments.values())
    for name, argument in call.arguments.items():
        if name != "out" and isinstance(argument, torch.Tensor):
            assert_same_bits(argument, before.arguments[name], name)


@pytest.mark.parametrize("layout", ["transposed", "every_other", "offset"])
def test_accumulate_writes_nothing_between_the_elements_of_out(place, dtype, layout):
    out = laid_out(torch.ones(7, 24, dtype=dtype, device=place.device), layout)
    memory = out._base if out._base is not None else out
    outside = memory.clone()
    hidden, factor = torch.ones(7, 3, device=place.device), torch.ones(3, 24, device=place.device)
    lora.lora_accumulate_(out, hidden, factor, 2.0, 0.0, None)
    assert torch.equal(out, torch.full_like(out, 7.0))
    out.fill_(1.0)
    assert torch.equal(memory.nan_to_num(), outside.nan_to_num())


@pytest.mark.parametrize("operator", ["lora_shrink", "lora_factor_grad"])
def test_dropped_elements_are_zero_even_where_x_is_not_finite(operator, place, dtype):
    call = random_call(operator, rows=20, columns=60, dtype=dtype, dropout_p=0.5, device=place.device)
    keep = lora.dropout_mask(20, 60, 0.5, call.arguments["rng_state"])
    results = [
        call.map(lambda t: t, x=call.arguments["x"].masked_fill(~keep, value)).run(LAUNCHERS[operator])[0]
        for value in (float("nan"), 0.0)
    ]
    assert_same_bits(*results)


@pytest.mark.parametrize("rank", [1, 8, 33])
def test_accumulate_rounds_each_element_once(place, half, rank):
    # The operator that merges weights: float32 factors count with 16 bits even where out has 8.
    call = random_call(
        "lora_accumulate_", rows=31, columns=70, rank=rank, dtype=half, factor_dtype=torch.float32, device=place.device
    )
    (result,), (exact,) = call.run(lora.lora_accumulate_), formula(call, torch.float64)
    (magnitude,) = formula(call.map(torch.abs), torch.float64)
    allowed = torch.finfo(half).eps / 2 * exact.abs() + 2.0**-16 * magnitude
    assert bool(((result.double() - exact).abs() <= allowed).all())
