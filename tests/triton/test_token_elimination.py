"""The operators of token elimination on Triton: tiles, layouts, rows that stand for none, bad input."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from peft_kernels.triton_kernels import token_elimination

from peft_kernels.reference import token_elimination as reference

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import laid_out

# M, K, N and how many rows are kept. Around tiles of 64 and 128, and beyond a group of eight row tiles.
SIZES = [
    (1, 1, 1, 1), (9, 5, 4, 0), (9, 0, 4, 3), (9, 5, 0, 3), (0, 5, 4, 2), (20, 33, 17, 7), (70, 130, 65, 70),
    (300, 70, 130, 129), (140, 9, 70, 130), (600, 3, 5, 530),
]  # fmt: skip
FLAGS = list(itertools.product([False, True], repeat=4))
"""gather, transposed, with a residual, with a bias."""
LAUNCHERS = (token_elimination.gather_linear_scatter, token_elimination.fused_gather_linear_scatter)
"""The one that is registered leaves float32 to the library."""
IN_PLACE = dict(
    zip(
        LAUNCHERS,
        (token_elimination.gather_linear_scatter_, token_elimination.fused_gather_linear_scatter_),
        strict=True,
    )
)


def kept(total, count, device, holes=0):
    """Sorted rows, of which the last `holes` and one in the middle stand for none; none at all where there are none."""
    if total == 0:
        return torch.full((count,), -1, dtype=torch.int32, device=device)
    rows = torch.randperm(total)[:count].sort().values.int()
    if holes:
        rows[count // 2] = -1
        rows[count - holes :] = -7
    return rows.to(device)


def call(sizes, flags, dtype, device, holes=0, integers=False):
    (m, k, n, s), (gather, transposed, added, biased) = sizes, flags

    def operand(*shape):
        values = torch.randint(-2, 3, shape) if integers else torch.randn(shape)
        return values.to(dtype).to(device)

    rows = kept(m, s, device, min(holes, s))
    x, weight = operand(m if gather else s, k), operand(*((k, n) if transposed else (n, k)))
    bias, residual = operand(n) if biased else None, operand(m, n) if added else None
    return [x, weight, bias, rows, residual, gather, transposed]


def double(arguments):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def changed(launcher, arguments):
    """What the launcher's form in place makes of a copy of the residual, with its strides."""
    x, weight, bias, rows, residual, gather, transposed = arguments
    out = torch.empty_strided(residual.shape, residual.stride(), dtype=x.dtype, device=x.device).copy_(residual)
    assert IN_PLACE[launcher](out, x, weight, bias, rows, gather, transposed) is None
    return out


def check(launcher, arguments):
    found, (x, _, _, rows, residual, _, _) = launcher(*arguments), arguments
    assert found.dtype == x.dtype and found.is_contiguous()
    exact = reference.gather_linear_scatter(*double(arguments))
    assert_accurate(found, reference.gather_linear_scatter(*arguments), exact, launcher.__name__)
    if residual is not None:
        dropped = torch.ones(residual.shape[0], dtype=torch.bool, device=x.device)
        dropped[rows[rows >= 0].long()] = False
        assert_same_bits(found[dropped], residual[dropped], "dropped rows")
        assert_same_bits(changed(launcher, arguments), found, "in place")
    else:
        assert not found[rows < 0].any()
    return found


@pytest.mark.parametrize("operator", token_elimination.LAUNCHERS)
def test_launchers_have_the_operators_arguments(operator):
    schema = getattr(torch.ops.peft_kernels, operator).default._schema
    parameters = inspect.signature(token_elimination.LAUNCHERS[operator]).parameters
    assert [argument.name for argument in schema.arguments] == list(parameters)


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(place, dtype, launcher, sizes):
    for flags in ((True, False, True, False), (False, True, False, True)):
        check(launcher, call(sizes, flags, dtype, place.device))


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_every_form_with_rows_that_stand_for_none(place, dtype, launcher, flags):
    check(launcher, call((70, 40, 35, 30), flags, dtype, place.device, holes=4))


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_integers_give_exact_sums(place, dtype, flags):
    arguments = call((90, 70, 33, 66), flags, dtype, place.device, holes=3, integers=True)
    found = token_elimination.fused_gather_linear_scatter(*arguments)
    assert_same_bits(found + 0.0, reference.gather_linear_scatter(*double(arguments)).to(dtype) + 0.0)


def test_a_result_is_rounded_once(place, half):
    arguments = call((40, 64, 48, 20), (True, False, True, True), half, place.device)
    wide = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    found = token_elimination.fused_gather_linear_scatter(*arguments)
    exact = reference.gather_linear_scatter(*double(arguments))
    allowed = torch.finfo(half).eps / 2 * exact.abs() + 1e-5 * reference.gather_linear_scatter(
        *(a.abs() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in wide)
    )
    assert bool(((found.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("layout", ["transposed", "every_other", "offset", "padded"])
@pytest.mark.parametrize("flags", [(True, False, True, True), (False, True, False, True)], ids=str)
def test_strides(place, dtype, layout, flags):
    arguments = call((37, 24, 41, 19), flags, dtype, place.device, holes=2)
    expected = token_elimination.fused_gather_linear_scatter(*arguments)
    views = [laid_out(a, layout) if isinstance(a, torch.Tensor) else a for a in arguments]
    assert_same_bits(token_elimination.fused_gather_linear_scatter(*views), expected)
    if views[4] is not None:
        out = changed(token_elimination.fused_gather_linear_scatter, views)
        assert out.stride() == views[4].stride()
        assert_same_bits(out.contiguous(), expected, "in place")


def test_memory_between_the_rows_of_out_is_left_alone(place, dtype):
    arguments = call((37, 24, 41, 19), (True, False, True, True), dtype, place.device, holes=2)
    x, weight, bias, rows, residual, gather, transposed = arguments
    memory = torch.full((39, 50), 7.0, dtype=dtype, device=place.device)
    memory[1:38, 3:44] = residual
    expected = memory.clone()
    expected[1:38, 3:44] = token_elimination.fused_gather_linear_scatter(*arguments)
    token_elimination.fused_gather_linear_scatter_(memory[1:38, 3:44], x, weight, bias, rows, gather, transposed)
    assert_same_bits(memory, expected)


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda f: f.__name__)
def test_what_is_not_finite_stays_in_its_row(place, dtype, launcher):
    arguments = call((50, 20, 30, 20), (True, False, True, False), dtype, place.device)
    clean = launcher(*arguments)
    x, rows = arguments[0], arguments[3].long()
    dropped = torch.ones(50, dtype=torch.bool, device=place.device).index_fill(0, rows, False)
    x[dropped] = float("nan")
    assert_same_bits(launcher(*arguments), clean)
    x[rows[4], 3] = float("nan")
    found = launcher(*arguments)
    assert found[rows[4]].isnan().all() and int(found.isnan().any(1).sum()) == 1


def test_half_precision_is_one_product_and_float32_the_librarys(place, dtype, launched):
    arguments = call((30, 20, 10, 9), (True, False, True, True), dtype, place.device)
    expected = ["gather_matmul_kernel"] if dtype.itemsize == 2 else ["gather_rows_kernel", "scatter_add_rows_kernel"]
    for run in (lambda: token_elimination.gather_linear_scatter(*arguments), lambda: changed(LAUNCHERS[0], arguments)):
        launched.clear()
        run()
        assert [name for name, _ in launched] == expected


MOVED = [(1, 1, 1), (9, 5, 0), (9, 0, 3), (0, 5, 2), (20, 33, 7), (13, 1030, 13), (9, 2100, 5)]


@pytest.mark.parametrize("size", MOVED, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every_other", "offset"])
def test_moved_rows_are_exact(place, dtype, size, layout):
    m, c, s = size
    x, values = (laid_out(torch.randn(rows, c, device=place.device).to(dtype), layout) for rows in (m, s))
    rows = kept(m, s, place.device, min(s, 2) if s > 2 else 0)
    rows = laid_out(rows, layout)
    found = token_elimination.gather_rows(x, rows)
    assert found.is_contiguous()
    assert_same_bits(found, reference.gather_rows(x, rows))
    total = token_elimination.scatter_add_rows(x, values, rows)
    assert total.is_contiguous()
    assert_same_bits(total, reference.scatter_add_rows(x, values, rows))
    token_elimination.scatter_add_rows_(x, values, rows)
    assert_same_bits(x.clone(memory_format=torch.contiguous_format), total)


def test_arguments_are_left_alone(place, dtype):
    for launcher, flags in itertools.product(LAUNCHERS, ((True, False, True, True), (False, True, False, True))):
        arguments = call((20, 10, 12, 9), flags, dtype, place.device)
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        launcher(*arguments)
        for now, then in zip(arguments, before, strict=True):
            if isinstance(now, torch.Tensor):
                assert_same_bits(now, then)


PRODUCT = ("x", "weight", "bias", "rows", "residual", "gather", "transposed")
BAD = {
    "x_vector": ("gather_linear_scatter", "x", lambda t: t[0], "x must be 2-D, got float32 [10]"),
    "x_float64": ("gather_linear_scatter", "x", torch.Tensor.double, "x must be float32, bfloat16 or float16"),
    "weight_of_other_width": ("gather_linear_scatter", "weight", lambda t: t[:, 1:], "weight must be [N, 10], got"),
    "weight_of_other_dtype": ("gather_linear_scatter", "weight", torch.Tensor.half, "weight must have x's dtype"),
    "weight_elsewhere": ("gather_linear_scatter", "weight", lambda t: t.to("meta"), "weight must be on "),
    "weight_taken_for_transposed": ("gather_linear_scatter", "transposed", lambda _: True, "must be [10, N], got"),
    "bias_of_other_length": ("gather_linear_scatter", "bias", lambda t: t[1:], "bias must be [12] in x's dtype"),
    "rows_int64": ("gather_linear_scatter", "rows", torch.Tensor.long, "rows must be int32, got int64 [9]"),
    "rows_matrix": ("gather_linear_scatter", "rows", lambda t: t[None], "rows must be 1-D, got int32 [1, 9]"),
    "rows_elsewhere": ("gather_linear_scatter", "rows", lambda t: t.to("meta"), "rows must be on "),
    "x_taken_for_gathered": ("gather_linear_scatter", "gather", lambda _: False, "x must be [9, K], gathered as rows"),
    "residual_of_other_rows": ("gather_linear_scatter", "residual", lambda t: t[1:], "residual must be [20, 12]"),
    "out_of_other_rows": ("gather_linear_scatter_", "out", lambda t: t[1:], "out must be [20, 12], got"),
    "out_of_other_dtype": ("gather_linear_scatter_", "out", torch.Tensor.half, "out must have x's dtype"),
    "bias_beside_out": ("gather_linear_scatter_", "bias", lambda t: t[1:], "bias must be [12] in x's dtype"),
    "product_expanded": ("gather_linear_scatter_", "out", lambda t: t[:1].expand(20, 12), "must not overlap itself"),
    "residual_of_other_dtype": ("gather_linear_scatter", "residual", torch.Tensor.half, "residual must have x's"),
    "gathered_vector": ("gather_rows", "x", lambda t: t[0], "x must be 2-D, got float32 [10]"),
    "gathered_int64": ("gather_rows", "rows", torch.Tensor.long, "rows must be int32, got int64 [9]"),
    "values_of_other_count": ("scatter_add_rows", "values", lambda t: t[1:], "values must be [9, 12], got [8, 12]"),
    "values_of_other_dtype": ("scatter_add_rows", "values", torch.Tensor.half, "values must have residual's dtype"),
    "out_float64": ("scatter_add_rows_", "out", torch.Tensor.double, "out must be float32, bfloat16 or float16"),
    "out_expanded": ("scatter_add_rows_", "out", lambda t: t[:1].expand(20, 12), "must not overlap itself"),
}


@pytest.mark.parametrize(("operator", "name", "change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_and_launches_nothing(place, launched, operator, name, change, message):
    given = dict(
        zip(PRODUCT, call((20, 10, 12, 9), (True, False, True, True), torch.float32, place.device), strict=True)
    )
    given |= {"values": torch.randn(9, 12, device=place.device), "out": torch.randn(20, 12, device=place.device)}
    given[name] = change(given[name])
    launcher = token_elimination.LAUNCHERS[operator]
    with pytest.raises(RuntimeError) as error:
        launcher(*(given[parameter] for parameter in inspect.signature(launcher).parameters))
    assert str(error.value).startswith(f"{operator}: ") and message in str(error.value)
    assert launched == []


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
@pytest.mark.parametrize("side", ["before", "behind"])
def test_what_is_changed_lies_apart_from_what_is_read(place, launched, name, side):
    arguments = call((20, 10, 12, 9), (True, False, True, True), torch.float32, place.device)
    given, memory = dict(zip(PRODUCT, arguments, strict=True)), torch.zeros(700, device=place.device)
    given["out"], (shape, size) = memory[200:440].view(20, 12), (given[name].shape, given[name].numel())
    launcher = token_elimination.LAUNCHERS["gather_linear_scatter_"]

    def run(start):
        given[name] = memory[start : start + size].view(shape)
        launcher(*(given[parameter] for parameter in inspect.signature(launcher).parameters))

    beside, step = (200 - size, 1) if side == "before" else (440, -1)
    with pytest.raises(RuntimeError, match=f"gather_linear_scatter_: out .* must lie apart from {name} in memory"):
        run(beside + step)
    assert launched == []
    run(beside)
    assert launched
