"""The raw operators against their definition: every dtype, pattern of kept rows and layout, on every backend."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.reference import token_elimination as reference

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.places import compiled_cases, compiled_places, operators_at_places
from ..support.token_elimination import (
    EXACT,
    IN_PLACE,
    OPERATORS,
    PATTERNS,
    SIZES,
    arguments,
    is_kept,
    rows_of,
    run,
    variants,
    widened,
)

EACH = pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(OPERATORS))
# The definition is torch's own operations, which round as they like from layout to layout.
EACH_KERNEL = pytest.mark.parametrize(
    ("operator", "place", "dtype"),
    [case for case in operators_at_places(OPERATORS) if case.values[1].backend != "reference"],
)
EACH_PATTERN = pytest.mark.parametrize("pattern", PATTERNS)
LINEAR = ("gather_linear_scatter", "gather_linear_scatter_")


def assert_close_to_definition(operator, place, dtype, call):
    definition = getattr(reference, operator)
    actual = run(place.kernel(operator, dtype), operator, call)
    own = run(definition, operator, call)
    exact = run(definition, operator, widened(call))
    for number, (left, right, wide) in enumerate(zip(actual, own, exact, strict=True)):
        assert left.dtype == right.dtype and (left.is_contiguous() or operator in IN_PLACE)
        if operator in EXACT:
            assert_same_bits(left, right)
        else:
            assert_accurate(left, right, wide, f"result {number}")
    return actual


@EACH
@EACH_PATTERN
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_results_are_those_of_the_definition(operator, place, dtype, pattern, size):
    for variant in variants(operator):
        assert_close_to_definition(
            operator, place, dtype, arguments(operator, size, pattern, dtype, place.device, variant)
        )


@pytest.mark.parametrize(
    ("operator", "place", "dtype"),
    operators_at_places(
        ("gather_rms_norm", "rms_norm_rows", "gather_rms_norm_backward", "rope_rows"), (torch.bfloat16, torch.float32)
    ),
)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_and_angles_have_a_dtype_of_their_own(operator, place, dtype, weight_dtype):
    call = arguments(operator, (9, 70), "holes", dtype, place.device, weight_dtype=weight_dtype)
    actual = assert_close_to_definition(operator, place, dtype, call)
    if operator == "gather_rms_norm_backward":
        assert actual[1].dtype == weight_dtype


@pytest.mark.parametrize(
    ("operator", "place", "dtype"),
    operators_at_places(
        ("scatter_add_rows", *IN_PLACE, "gather_rms_norm_backward", "gather_linear_scatter"),
    ),
)
@EACH_PATTERN
def test_rows_that_are_not_kept_stay_bit_for_bit(operator, place, dtype, pattern):
    names = {"gather_rms_norm_backward": "grad_residual", **dict.fromkeys(IN_PLACE, "out")}
    call = arguments(operator, (66, 33), pattern, dtype, place.device)
    residual = call[names.get(operator, "residual")]
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-30], dtype=dtype, device=place.device)
    dropped = ~is_kept(call["rows"], 66)
    residual[dropped.to(place.device), :4] = special
    result = run(place.kernel(operator, dtype), operator, call)[0]
    assert_same_bits(result.cpu()[dropped], residual.cpu()[dropped])


@pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(("gather_rms_norm",)))
@pytest.mark.parametrize("with_rows", [True, False])
def test_a_norm_is_formed_again_to_the_bit(operator, place, dtype, with_rows):
    call = arguments(operator, (66, 130), "holes", dtype, place.device, {"rows": with_rows, "offset": 1.0})
    h, kept, rstd = place.kernel(operator, dtype)(*call.values())
    again = place.kernel("rms_norm_rows", dtype)(kept if with_rows else call["x"], rstd, call["weight"], 1.0)
    assert_same_bits(again, h)


# The product is the library's, which may sum in another order.
@pytest.mark.parametrize(
    ("operator", "place", "dtype"),
    [
        case
        for case in operators_at_places(OPERATORS)
        if case.values[1].backend != "reference" and case.values[0] not in LINEAR
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_in_every_layout(operator, place, dtype, layout):
    for variant in variants(operator):
        call = arguments(operator, (66, 70), "sequences", dtype, place.device, variant)
        views = {
            name: laid_out(value, layout) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in call.items()
        }
        kernel = place.kernel(operator, dtype)
        for left, right in zip(run(kernel, operator, views), run(kernel, operator, call), strict=True):
            assert_same_bits(left.contiguous(), right)


@pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(LINEAR))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_product_of_any_layout(operator, place, dtype, layout):
    for variant in variants(operator):
        call = arguments(operator, (66, 70), "sequences", dtype, place.device, variant)
        names = ("x", "weight", "residual", "out")
        views = {name: laid_out(v, layout) if name in names and v is not None else v for name, v in call.items()}
        assert_close_to_definition(operator, place, dtype, views)


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@EACH_KERNEL
def test_same_bits_for_any_number_of_threads(operator, place, dtype, restored_threads):
    for variant in variants(operator):
        call = arguments(operator, (150, 1030), "holes", dtype, place.device, variant)
        if operator in LINEAR:  # its product is the library's: one that every order sums alike
            call = {
                n: v.sign() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in call.items()
            }
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(run(place.kernel(operator, dtype), operator, call))
        for later in runs[1:]:
            for left, right in zip(later, runs[0], strict=True):
                assert_same_bits(left, right)


@pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(LINEAR, (torch.float32,)))
@pytest.mark.parametrize("shift", [0, 2040, 2100])
def test_more_rows_than_one_product_takes(operator, place, dtype, shift):
    if place.simulated:
        pytest.skip("too many rows for the executor")
    total = 6000
    call = arguments(operator, (total, 8), "holes", dtype, place.device)
    rows = call["rows"]
    holes = torch.full((shift,), -1, dtype=torch.int32, device=place.device)  # ends of sequences, longer than a product
    call["rows"] = torch.cat((rows[:100], holes, rows[100:], holes))
    for gather in (True, False):
        chosen = {**call, "gather": gather}
        if not gather:
            chosen["x"] = reference.gather_rows(call["x"], call["rows"])
        assert_close_to_definition(operator, place, dtype, chosen)


@pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(("gather_rms_norm", "scatter_add_rows")))
def test_what_is_not_finite_stays_visible(operator, place, dtype):
    call = arguments(operator, (6, 40), "all", dtype, place.device)
    source = call["x" if operator == "gather_rms_norm" else "values"]
    source[1, 3], source[2, 38] = float("nan"), float("inf")
    result = run(place.kernel(operator, dtype), operator, call)[0]
    own = run(getattr(reference, operator), operator, call)[0]
    assert torch.equal(result.isnan(), own.isnan()) and torch.equal(result.isinf(), own.isinf())


# On the CPU a pass over the rows costs nothing beside what they move, so there they are looked at.
BAD_ROWS = {
    "beyond": ([0, 9], r"rows must be below 9, got 9 at position 1"),
    "twice": ([-1, 3, -1, 3], r"rows must be sorted and unique, got 3 at position 3 after 3"),
    "unsorted": ([4, 3], r"rows must be sorted and unique, got 3 at position 1 after 4"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("operator", ["scatter_add_rows", *IN_PLACE, "gather_rows", "gather_rms_norm"])
def test_the_cpu_refuses_wrong_rows_before_anything_changes(operator, kind):
    rows, message = BAD_ROWS[kind]
    call = arguments(operator, (9, 5), "none", torch.float32)
    call["rows"] = torch.tensor(rows, dtype=torch.int32)
    if "values" in call:
        call["values"] = torch.ones(len(rows), 5)
    before = {name: value.clone() for name, value in call.items() if isinstance(value, torch.Tensor)}
    kernel = getattr(torch.ops.peft_kernels, operator)
    if "scatter" not in operator and kind != "beyond":  # any order can be read
        kernel(*call.values())
        return
    with pytest.raises(RuntimeError, match=f"{operator}: {message}"):
        kernel(*call.values())
    for name, value in before.items():
        assert_same_bits(call[name], value)


# What is changed about a good call (float32 [9, 5], some rows kept), and the message.
BAD_CALLS = [
    ("gather_rows", {"x": lambda t: t[0]}, r"x must be 2-D, got (float32 )?\[5\]"),
    ("gather_rows", {"x": torch.Tensor.int}, r"x must be float32, .*, got int32 \[9, 5\]"),
    ("gather_rows", {"rows": torch.Tensor.long}, r"rows must be int32, got int64"),
    ("gather_rows", {"rows": lambda t: t[None]}, r"rows must be 1-D, got int32 \[1, "),
    ("scatter_add_rows", {"values": lambda t: t[:, 1:]}, r"values must be \[\d, 5\], got (float32 )?\[\d, 4\]"),
    ("scatter_add_rows", {"values": torch.Tensor.half}, r"values must have .*, float32, got float16"),
    ("scatter_add_rows_", {"values": lambda t: t[1:]}, r"values must be \[\d, 5\], got (float32 )?\[\d, 5\]"),
    ("scatter_add_rows_", {"out": lambda t: t[:1].expand(9, 5)}, r"out is written in place and must not overlap"),
    ("gather_rms_norm", {"weight": lambda t: t[1:]}, r"weight must be \[5\], got (float32 )?\[4\]"),
    ("gather_rms_norm", {"weight": torch.Tensor.int}, r"weight must be float32, .*, got int32 \[5\]"),
    ("rms_norm_rows", {"rstd": torch.Tensor.half}, r"rstd must be float32 \[\d\], got float16"),
    ("rms_norm_rows", {"rstd": lambda t: t[1:]}, r"rstd must be float32 \[\d\], got (float32 )?\[\d\]"),
    ("gather_rms_norm_backward", {"grad_h": lambda t: t[:, 1:]}, r"grad_h must be \[\d, 5\], got"),
    ("gather_rms_norm_backward", {"grad_residual": lambda t: t[1:]}, r"grad_residual must be \[9, 5\], got"),
    ("gather_rms_norm_backward", {"rows": lambda t: t[1:]}, r"rows must be \[\d\], as many as kept has"),
    ("gather_rms_norm_backward", {"rows": lambda t: None}, r"total must be \d, kept's rows, without rows, got 9"),
    ("rope_rows", {"x": lambda t: t[0]}, r"x must be \[S, heads, D\], got (float32 )?\[3, 5\]"),
    ("rope_rows", {"cos": lambda t: t[:, 1:]}, r"cos must be \[P, R\] with R even and at most 5"),
    ("rope_rows", {"sin": lambda t: t[1:]}, r"sin must be like cos, .*, got float32"),
    ("rope_rows", {"x": lambda t: t[1:]}, r"x must be \[\d, heads, D\], as many tokens as rows, got"),
    ("gather_linear_scatter", {"weight": lambda t: t[:, 1:]}, r"weight must be \[N, 5\], got (float32 )?\[8, 4\]"),
    ("gather_linear_scatter", {"weight": torch.Tensor.half}, r"weight must have .* float32, got float16"),
    ("gather_linear_scatter", {"bias": lambda t: t[1:]}, r"bias must be \[8\] .*, got (float32 )?\[7\]"),
    ("gather_linear_scatter", {"residual": lambda t: t[1:]}, r"residual must be \[9, 8\], got (float32 )?\[8, 8\]"),
    ("gather_linear_scatter", {"gather": lambda _: False}, r"x must be \[\d, K\], gathered as rows are, got"),
    ("gather_linear_scatter_", {"bias": lambda t: t[1:]}, r"bias must be \[8\] .*, got (float32 )?\[7\]"),
    ("gather_linear_scatter_", {"out": lambda t: t[1:]}, r"out must be \[9, 8\], got (float32 )?\[8, 8\]"),
    ("gather_linear_scatter_", {"out": torch.Tensor.half}, r"out must have .* float32, got float16"),
    ("gather_linear_scatter_", {"out": lambda t: t[:1].expand(9, 8)}, r"out is written in place and must not overlap"),
]


@pytest.mark.parametrize(("namespace", "device"), compiled_places("gather_linear_scatter_"))
@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_what_a_product_reads_must_lie_apart_from_what_it_is_added_to(namespace, device, name):
    call = arguments("gather_linear_scatter_", (9, 5), "some", torch.float32, device)
    kernel = getattr(torch.ops, namespace).gather_linear_scatter_
    memory = torch.zeros(200, device=device)
    call["out"] = memory[:72].view(9, 8)
    size, shape = call[name].numel(), call[name].shape
    call[name] = memory[72 : 72 + size].view(shape)  # right behind it
    kernel(*call.values())
    before = memory.clone()
    call[name] = memory[71 : 71 + size].view(shape)
    with pytest.raises(RuntimeError, match=f"gather_linear_scatter_: out .* must lie apart from {name} in memory"):
        kernel(*call.values())
    assert_same_bits(memory, before)


@pytest.mark.parametrize(("namespace", "device", "operator", "changes", "message"), compiled_cases(BAD_CALLS))
def test_bad_arguments_are_refused(namespace, device, operator, changes, message):
    call = arguments(operator, (9, 5), "some", torch.float32, device)
    assert 0 < rows_of("some", 9).shape[0] < 9
    for name, change in changes.items():
        call[name] = change(call[name])
    with pytest.raises(RuntimeError, match=f"{operator}: {message}"):
        getattr(getattr(torch.ops, namespace), operator)(*call.values())


# Rows would be read when others have changed them, by this thread or another one.
SHARED = {
    "rows": lambda memory: memory[1:4],
    "one element": lambda memory: memory.flatten()[29:44].view(3, 5),
    "strided": lambda memory: memory[::2, :1].expand(-1, 5)[:3],
}


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize(("namespace", "device"), compiled_places("scatter_add_rows_"))
def test_values_among_what_is_changed_are_refused(namespace, device, kind):
    memory = torch.arange(45.0, device=device).view(9, 5)
    rows, before = torch.tensor([1, 2, 3], dtype=torch.int32, device=device), memory.clone()
    scatter_add_rows_ = getattr(torch.ops, namespace).scatter_add_rows_
    with pytest.raises(RuntimeError, match=r"scatter_add_rows_: out .* must lie apart from values in memory"):
        scatter_add_rows_(memory[:6], SHARED[kind](memory), rows)
    assert torch.equal(memory, before)
    scatter_add_rows_(memory[:6], memory[6:], rows)  # neighbors share nothing
    before[1:4] += before[6:]
    assert torch.equal(memory, before)
