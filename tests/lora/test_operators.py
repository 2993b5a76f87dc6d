"""Every operator on every backend of this machine against its formula in float64, by the accuracy rule."""

from __future__ import annotations

import itertools

import pytest
import torch

from peft_kernels.reference import lora as reference

from ..support.accuracy import assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.operators import ACTIVATIONS, DROPPING, OPERATORS, check_call, formula, random_call, result_dtypes
from ..support.places import operators_at_places, places, places_and_dtypes

RANKS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65)
SIZES = (
    (1, 1, 1), (1, 64, 64), (2, 3, 5), (7, 24, 20), (16, 33, 17), (65, 127, 40), (3, 500, 129), (130, 8, 260),
    (20, 2500, 64),
)  # fmt: skip
HALF = (torch.bfloat16, torch.float16)


def each_operator(*dtypes, operators=OPERATORS):
    """pytest parameters (operator, place, dtype), for every place that serves the operator in the dtype."""
    return pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(operators, dtypes))


EACH_OPERATOR = each_operator(torch.float32, *HALF, torch.float64)


def check(call, place, dtype):
    return check_call(call, place.kernel(call.operator, dtype), dtype)


@EACH_OPERATOR
@pytest.mark.parametrize(("rows", "columns", "out_columns"), SIZES)
def test_sizes(operator, place, dtype, rows, columns, out_columns):
    sizes = {"rows": rows, "columns": columns, "out_columns": out_columns}
    check(random_call(operator, **sizes, dtype=dtype, device=place.device), place, dtype)


@EACH_OPERATOR
@pytest.mark.parametrize("rank", RANKS)
def test_ranks(operator, place, dtype, rank):
    call = random_call(operator, rows=19, columns=43, out_columns=37, rank=rank, dtype=dtype, device=place.device)
    check(call, place, dtype)


@EACH_OPERATOR
@pytest.mark.parametrize("rank", [1, 8, 17])
def test_without_bias_and_transposed(operator, place, dtype, rank):
    call = random_call(operator, rank=rank, dtype=dtype, bias=False, transposed=True, device=place.device)
    check(call, place, dtype)


@each_operator(torch.float32, *HALF, torch.float64, operators=DROPPING)
@pytest.mark.parametrize("dropout_p", [2.0**-18, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("rank", [3, 16])
def test_dropout(operator, place, dtype, dropout_p, rank):
    call = random_call(
        operator, rows=33, columns=77, out_columns=51, rank=rank, dtype=dtype, dropout_p=dropout_p, device=place.device
    )
    check(call, place, dtype)


@each_operator(*HALF)
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_factors_of_another_dtype(operator, place, dtype, factor_dtype, transposed):
    call = random_call(
        operator, rows=21, columns=70, out_columns=35, rank=8, dtype=dtype, factor_dtype=factor_dtype,
        dropout_p=0.25, transposed=transposed, device=place.device,
    )  # fmt: skip
    check(call, place, dtype)


@each_operator(torch.float32, *HALF)
@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float32])
def test_factors_of_half_precision_under_float32(operator, place, dtype, factor_dtype):
    call = random_call(operator, rank=5, dtype=dtype, factor_dtype=factor_dtype, device=place.device)
    check(call, place, dtype)


@EACH_OPERATOR
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("rank", [1, 6, 16])
def test_integers_give_exact_results(operator, place, dtype, dropout_p, rank):
    # Every product and sum is exact in float32, and the results in the tested dtype: a sum formed in half precision,
    # an element left out or taken twice, a mask off by one all show.
    call = random_call(
        operator, rows=30, columns=90, out_columns=50, rank=rank, dtype=dtype, dropout_p=dropout_p, integers=True,
        device=place.device,
    )  # fmt: skip
    results = call.run(place.kernel(operator, dtype))
    for actual, exact, promised in zip(results, formula(call, torch.float64), result_dtypes(call), strict=True):
        assert_same_bits(actual, exact.to(promised) + 0.0)


@each_operator(*HALF, operators=("lora_shrink", "lora_factor_grad", "lora_grad_b"))
def test_long_sums_are_formed_in_float32(operator, place, dtype):
    # Ones added up one by one stall at 256 in bfloat16 and at 2048 in float16.
    call = random_call(
        operator, rows=4099, columns=4099, out_columns=4099, rank=2, dtype=dtype, factor_dtype=torch.float32,
        device=place.device,
    )  # fmt: skip
    ones = call.map(torch.ones_like, scaling=1.0)
    for result in ones.run(place.kernel(operator, dtype)):
        assert torch.equal(result, torch.full_like(result, 4099))


@EACH_OPERATOR
def test_zero_rows(operator, place, dtype):
    dropout_p = 0.5 if operator in DROPPING else 0.0
    call = random_call(operator, rows=0, dropout_p=dropout_p, dtype=dtype, device=place.device)
    for actual, exact, promised in zip(
        call.run(place.kernel(operator, dtype)), formula(call, torch.float64), result_dtypes(call), strict=True
    ):
        # A gradient over no rows is zero, not unwritten memory.
        assert_same_bits(actual, exact.to(promised))


@EACH_OPERATOR
@pytest.mark.parametrize("empty", ["columns", "out_columns"])
@pytest.mark.parametrize("rows", [0, 7])
def test_zero_columns(operator, place, dtype, empty, rows):
    call = random_call(operator, rows=rows, **{empty: 0}, dtype=dtype, integers=True, device=place.device)
    for actual, exact, promised in zip(
        call.run(place.kernel(operator, dtype)), formula(call, torch.float64), result_dtypes(call), strict=True
    ):
        assert actual.dtype == promised
        assert torch.equal(actual.double(), exact)


@EACH_OPERATOR
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("rank", [1, 9])
def test_strides(operator, place, dtype, layout, rank):
    dropout_p = 0.25 if operator in DROPPING else 0.0
    call = random_call(
        operator, rows=11, columns=45, out_columns=26, rank=rank, dtype=dtype, dropout_p=dropout_p, device=place.device
    )
    strided = call.map(lambda tensor: laid_out(tensor, layout))
    if operator == "lora_accumulate_":
        strided = strided.map(lambda tensor: tensor, out=laid_out(call.arguments["out"], "offset"))
    check(strided, place, dtype)


@pytest.mark.parametrize(("place", "dtype"), places_and_dtypes("lora_accumulate_"))
@pytest.mark.parametrize("layout", ["transposed", "every_other"])
def test_accumulate_into_columns_that_lie_apart(place, dtype, layout):
    call = random_call("lora_accumulate_", dtype=dtype, device=place.device)
    check(call.map(lambda tensor: tensor, out=laid_out(call.arguments["out"], layout)), place, dtype)


@EACH_OPERATOR
@pytest.mark.parametrize("which", ["rows", "columns", "everything"])
def test_expanded_inputs(operator, place, dtype, which):
    # What `sum().backward()` hands to backward: strides of zero.
    call = random_call(operator, rows=9, columns=20, out_columns=20, rank=3, dtype=dtype, device=place.device)
    name = "hidden" if operator == "lora_accumulate_" else ACTIVATIONS[operator]
    tensor = call.arguments[name]
    source = {"rows": tensor[:1], "columns": tensor[:, :1], "everything": tensor[:1, :1]}[which]
    check(call.map(lambda t: t, **{name: source.expand_as(tensor)}), place, dtype)


@each_operator(torch.float32, *HALF, torch.float64, operators=("lora_linear_backward",))
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_only_the_gradients_that_are_needed_are_made(operator, place, dtype, needs, dropout_p):
    sizes = {"rows": 37, "columns": 70, "out_columns": 45, "rank": 5}
    call = random_call(operator, **sizes, dtype=dtype, dropout_p=dropout_p, needs=needs, device=place.device)
    results = check(call, place, dtype)
    everything = call.map(lambda t: t, need_x=True, need_a=True, need_b=True).run(place.kernel(operator, dtype))
    for needed, result, whole in zip(needs, results, everything, strict=True):
        assert result.shape == (whole.shape if needed else (0,))
        if needed:
            torch.testing.assert_close(result, whole)
    if not call.arguments["need_a"]:
        for with_x, without in zip(results, check(call.map(lambda t: t, x=None), place, dtype), strict=True):
            assert_same_bits(without, with_x)


@pytest.mark.parametrize("operator", ["lora_matmul", "lora_linear_forward"])
@pytest.mark.parametrize("place", [param for param in places() if param.values[0].backend == "cpu"])
def test_autograd_does_not_take_the_product_of_the_library_for_the_whole(operator, place):
    call = random_call(operator)
    x = call.arguments["x"].clone().requires_grad_()
    result, *_ = call.map(lambda tensor: tensor, x=x).run(place.kernel(operator, torch.float32))
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        result.sum().backward()
    assert x.grad is None


@EACH_OPERATOR
def test_only_out_is_written(operator, place, dtype):
    call = random_call(operator, dtype=dtype, device=place.device)
    before = call.map(torch.clone)
    place.kernel(operator, dtype)(*call.arguments.values())
    for name, argument in call.arguments.items():
        if name != "out" and isinstance(argument, torch.Tensor):
            assert_same_bits(argument, before.arguments[name], name)


@pytest.mark.parametrize(("place", "dtype"), places_and_dtypes("lora_accumulate_"))
@pytest.mark.parametrize("columns", [1, 5, 16, 23, 24])
def test_accumulate_writes_nothing_beside_out(place, dtype, columns):
    call = random_call("lora_accumulate_", columns=columns, dtype=dtype, device=place.device).map(torch.ones_like)
    surroundings = torch.full((20, 64), -3.0, dtype=dtype, device=place.device)
    out = surroundings[5:12, 3 : 3 + columns]
    place.kernel("lora_accumulate_", dtype)(*call.map(lambda tensor: tensor, out=out).arguments.values())
    assert (out != -3.0).all()
    out.fill_(-3.0)
    assert (surroundings == -3.0).all()


@each_operator(torch.float32, torch.bfloat16, operators=("lora_shrink", "lora_factor_grad"))
def test_dropped_elements_are_zero_even_where_x_is_not_finite(operator, place, dtype):
    call = random_call(operator, rows=20, columns=60, dtype=dtype, dropout_p=0.5, device=place.device)
    keep = reference.dropped(torch.ones(20, 60), 0.5, call.arguments["rng_state"].cpu()).to(place.device) > 0
    poisoned = call.arguments["x"].masked_fill(~keep, float("nan"))
    clean = call.arguments["x"].masked_fill(~keep, 0.0)
    kernel = place.kernel(operator, dtype)
    results = [call.map(lambda tensor: tensor, x=x).run(kernel)[0] for x in (poisoned, clean)]
    assert_same_bits(*results)


@EACH_OPERATOR
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(operator, place, dtype, value):
    call = random_call(operator, dtype=dtype, device=place.device)
    call.arguments[ACTIVATIONS[operator]][3, 5] = value
    for result, exact in zip(call.run(place.kernel(operator, dtype)), formula(call, torch.float64), strict=True):
        assert torch.equal(result.isfinite(), exact.isfinite())
