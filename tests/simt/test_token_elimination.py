"""Rows of kept tokens in the executor: every alignment, rows that stand for none, every order of threads.

What every backend must do is in tests/token_elimination.
"""

from __future__ import annotations

import pytest
import torch

from peft_kernels.reference import token_elimination as reference

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.places import dtype_name
from . import build

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
TOTAL = 21
ROWS = {
    "none": (),
    "one": (20,),
    "some": (0, 1, 5, 6, 7, 19),
    "with missing ones": (-1, 2, 3, -1, -5, 9, 20, -1, -1),
    "missing ones only": (-1, -1, -3),
    "all": range(TOTAL),
}
EACH_CHOICE = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())


@pytest.fixture(scope="module")
def simulated():
    if build.compiler() is None:
        pytest.skip("no g++, which the executor needs to compile kernels for the CPU")
    build.load()
    return torch.ops.peft_kernels_simt


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def as_rows(rows):
    return torch.tensor(list(rows), dtype=torch.int32)


@EACH_DTYPE
@EACH_CHOICE
@pytest.mark.parametrize("columns", [1, 7, 32, 67])
def test_gathered_rows_are_copies(simulated, dtype, rows, columns):
    x, rows = normal(TOTAL, columns, dtype=dtype), as_rows(rows)
    expected = reference.gather_rows(x, rows)
    for layout in LAYOUTS:
        assert_same_bits(simulated.gather_rows(laid_out(x, layout), rows), expected, layout)


@EACH_DTYPE
@EACH_CHOICE
@pytest.mark.parametrize("columns", [1, 7, 32, 67])
def test_sums_are_rounded_once_and_other_rows_keep_their_bits(simulated, dtype, rows, columns):
    rows = as_rows(rows)
    residual, values = normal(TOTAL, columns, dtype=dtype), normal(len(rows), columns, dtype=dtype)
    residual[4] = -0.0
    if 8 not in rows:
        residual[8] = float("nan")
    expected = reference.scatter_add_rows(residual, values, rows)
    for layout in LAYOUTS:
        placed = laid_out(residual.clone(), layout), laid_out(values, layout), rows
        before = placed[0].clone()
        assert_same_bits(simulated.scatter_add_rows(*placed), expected, layout)
        assert_same_bits(placed[0], before, "residual")
        simulated.scatter_add_rows_(*placed)
        assert_same_bits(placed[0], expected, f"{layout}, in place")


def test_what_lies_between_rows_in_memory_is_left_alone(simulated):
    memory = torch.full((6, 10), 3.0)
    simulated.scatter_add_rows_(memory[1:5, 1:8:2], torch.ones(2, 4), as_rows([0, 3]))
    expected = torch.full((6, 10), 3.0)
    expected[1, 1:8:2] = expected[4, 1:8:2] = 4.0
    assert_same_bits(memory, expected)


@EACH_DTYPE
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("heads", "width", "rotated"),
    [(3, 64, 64), (2, 80, 32), (1, 12, 10), (5, 24, 0), (1, 2, 2), (4, 37, 36), (2, 40, 24)],
)
def test_heads_are_rotated_by_the_rows_of_their_tokens(simulated, dtype, inverse, heads, width, rotated):
    x, rows = normal(9, heads, width, dtype=dtype), as_rows([3, 0, -1, 14, 5, 5, -2, 1, 13])
    for table_dtype in (dtype, torch.float32):
        cos, sin = normal(15, rotated, dtype=table_dtype), normal(15, rotated, dtype=table_dtype)
        for chosen in (rows, None):
            tables = (cos, sin) if chosen is not None else (cos[:9], sin[:9])
            own = reference.rope_rows(x, *tables, chosen, inverse)
            exact = reference.rope_rows(x.double(), *(table.double() for table in tables), chosen, inverse)
            turned = simulated.rope_rows(x, *tables, chosen, inverse)
            assert turned.dtype == dtype and turned.is_contiguous()
            assert_accurate(turned, own, exact, "rotated heads")
            assert_same_bits(turned[..., rotated:], own[..., rotated:], "other channels")
            if chosen is not None:
                assert not turned[rows < 0].any()


@EACH_DTYPE
@EACH_LAYOUT
@pytest.mark.parametrize("width", [32, 30])
def test_rotation_takes_any_strides(simulated, dtype, layout, width):
    x, cos, sin = normal(5, 3, width, dtype=dtype), normal(8, width, dtype=dtype), normal(8, width, dtype=dtype)
    rows = as_rows([7, 1, 2, -1, 4])
    expected = simulated.rope_rows(x, cos, sin, rows, False)
    assert_same_bits(simulated.rope_rows(laid_out(x, layout), cos, sin, rows, False), expected, "x")
    of_heads = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same_bits(simulated.rope_rows(of_heads, cos, sin, rows, False), expected, "heads first")
    tables = laid_out(cos, layout), laid_out(sin, layout)
    assert_same_bits(simulated.rope_rows(x, *tables, rows, False), expected, "tables")


@EACH_DTYPE
def test_any_order_of_blocks_warps_and_lanes_gives_the_same_bits(simulated, dtype):
    rows = torch.randperm(90)[:40].sort().values.int()
    residual, values = normal(90, 300, dtype=dtype), normal(40, 300, dtype=dtype)
    x, cos, sin = normal(40, 6, 64, dtype=dtype), normal(90, 64), normal(90, 64)
    runs = []
    for seed in range(3):
        build.set_seed(seed)
        in_place = residual.clone()
        simulated.scatter_add_rows_(in_place, values, rows)
        runs.append(
            [
                simulated.gather_rows(residual, rows),
                simulated.scatter_add_rows(residual, values, rows),
                in_place,
                simulated.rope_rows(x, cos, sin, rows, False),
            ]
        )
    assert_same_bits(runs[0][1], runs[0][2])
    for run in runs[1:]:
        for actual, expected in zip(run, runs[0], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_nothing_to_do(simulated, shape):
    residual, rows = torch.zeros(shape), as_rows([-1, -1])
    values = torch.ones(2, shape[1])
    assert simulated.gather_rows(residual, rows).shape == (2, shape[1])
    assert not simulated.gather_rows(residual, rows).any()
    assert simulated.scatter_add_rows(residual, values, rows).shape == shape
    simulated.scatter_add_rows_(residual, values, rows)
    assert simulated.rope_rows(torch.zeros(0, 2, 4), torch.zeros(0, 4), torch.zeros(0, 4), None, False).shape == (
        0,
        2,
        4,
    )


def test_bad_arguments_are_named(simulated):
    x, rows = torch.zeros(5, 4), as_rows([0, 2])
    table = torch.zeros(5, 4)
    calls = {
        r"gather_rows: x must be float32, bfloat16 or float16, got float64": lambda: simulated.gather_rows(
            x.double(), rows
        ),
        r"gather_rows: rows must be int32, got int64 \[2\]": lambda: simulated.gather_rows(x, rows.long()),
        r"gather_rows: rows must be 1-D, got int32 \[1, 2\]": lambda: simulated.gather_rows(x, rows[None]),
        r"scatter_add_rows: values must be \[2, 4\], got float32 \[3, 4\]": lambda: simulated.scatter_add_rows(
            x, x[:3], rows
        ),
        r"scatter_add_rows_: values must have .* float32, got float16": lambda: simulated.scatter_add_rows_(
            x, x[:2].half(), rows
        ),
        r"scatter_add_rows_: out .* must not overlap itself": lambda: simulated.scatter_add_rows_(
            x[:1].expand(5, 4), x[:2], rows
        ),
        r"scatter_add_rows_: out .* must lie apart from values in memory": lambda: simulated.scatter_add_rows_(
            x, x[2:4], rows
        ),
        r"rope_rows: x must be \[S, heads, D\], got float32 \[5, 4\]": lambda: simulated.rope_rows(
            x, table, table, None, False
        ),
        r"rope_rows: cos must be \[P, R\] with R even and at most 2": lambda: simulated.rope_rows(
            x.view(5, 2, 2), table, table, None, False
        ),
        r"rope_rows: x must be \[2, heads, D\], as many tokens as rows": lambda: simulated.rope_rows(
            x.view(5, 1, 4), table, table, rows, False
        ),
    }
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=message):
            call()
    assert not x.any()
