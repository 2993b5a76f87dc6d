"""RMSNorm of kept rows in the executor: rows that registers hold and longer ones, rows that are none, any strides.

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
from .test_token_elimination import EACH_CHOICE, EACH_DTYPE, TOTAL, as_rows, normal, simulated

__all__ = ["simulated"]

EACH_WIDTH = pytest.mark.parametrize("columns", [1, 9, 72, 257, 2048, 2056])
EPS = 1e-5
LONG = {2049: "four warps and one more", 8192: "all that registers hold", 8200: "one chunk more", 17003: "odd"}


def wide(*tensors):
    return [tensor.double() if tensor is not None and tensor.is_floating_point() else tensor for tensor in tensors]


def check_forward(simulated, x, rows, weight, offset):
    """Forward, and h formed again."""
    h, kept, rstd = simulated.gather_rms_norm(x, rows, weight, EPS, offset)
    own, exact = (
        reference.gather_rms_norm(*arguments, EPS, offset) for arguments in ((x, rows, weight), wide(x, rows, weight))
    )
    assert_accurate(h, own[0], exact[0], "h")
    assert_same_bits(kept, own[1], "kept")
    assert rstd.dtype == torch.float32
    assert_accurate(rstd, own[2], exact[2], "rstd")
    again = simulated.rms_norm_rows(x if rows is None else kept, rstd, weight, offset)
    assert_same_bits(again, h, "h formed again")
    return h, x if rows is None else kept, rstd


def check_backward(simulated, grad_residual, grad_h, kept, rstd, weight, offset, rows, total):
    arguments = (grad_residual, grad_h, kept, rstd, weight, offset, rows, total, True)
    results = simulated.gather_rms_norm_backward(*arguments)
    own = reference.gather_rms_norm_backward(*arguments)
    exact = reference.gather_rms_norm_backward(*wide(*arguments[:5]), *arguments[5:])
    for name, actual, ours, true in zip(("dx", "dweight"), results, own, exact, strict=True):
        assert actual.dtype == ours.dtype
        assert_accurate(actual, ours, true, name)
    dx, nothing = simulated.gather_rms_norm_backward(*arguments[:-1], False)
    assert_same_bits(dx, results[0])
    assert nothing.shape == (0,) and nothing.dtype == weight.dtype
    return results


@EACH_DTYPE
@EACH_CHOICE
@pytest.mark.parametrize("columns", [9, 72])
def test_any_rows(simulated, dtype, rows, columns):
    x, rows, weight = normal(TOTAL, columns, dtype=dtype), as_rows(rows), normal(columns)
    _, kept, rstd = check_forward(simulated, x, rows, weight, 0.0)
    grad_residual, grad_h = normal(TOTAL, columns, dtype=dtype), normal(len(rows), columns, dtype=dtype)
    grad_residual[4] = -0.0
    dx, _ = check_backward(simulated, grad_residual, grad_h, kept, rstd, weight, 0.0, rows, TOTAL)
    dropped = torch.ones(TOTAL, dtype=torch.bool)
    dropped[rows[rows >= 0].long()] = False
    assert_same_bits(dx[dropped], grad_residual[dropped], "rows that were not kept")
    check_backward(simulated, None, grad_h, kept, rstd, weight, 0.0, rows, TOTAL)


@EACH_DTYPE
@EACH_WIDTH
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_all_rows(simulated, dtype, columns, offset):
    x, weight = normal(5, columns, dtype=dtype), normal(columns, dtype=dtype)
    _, kept, rstd = check_forward(simulated, x, None, weight, offset)
    grads = normal(5, columns, dtype=dtype), normal(5, columns, dtype=dtype)
    check_backward(simulated, *grads, kept, rstd, weight, offset, None, 5)
    check_backward(simulated, None, grads[1], kept, rstd, weight, offset, None, 5)


@EACH_DTYPE
@pytest.mark.parametrize("columns", LONG, ids=LONG.values())
def test_rows_that_registers_do_not_hold(simulated, dtype, columns):
    x, rows, weight = normal(4, columns, dtype=dtype), as_rows([1, -1, 3]), normal(columns)
    _, kept, rstd = check_forward(simulated, x, rows, weight, 1.0)
    grads = normal(4, columns, dtype=dtype), normal(3, columns, dtype=dtype)
    check_backward(simulated, *grads, kept, rstd, weight, 1.0, rows, 4)


@EACH_DTYPE
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
def test_weights_of_any_dtype(simulated, dtype, weight_dtype):
    x, rows, weight = normal(7, 40, dtype=dtype), as_rows([0, 3, 6]), normal(40, dtype=weight_dtype)
    _, kept, rstd = check_forward(simulated, x, rows, weight, 0.0)
    check_backward(simulated, x, kept, kept, rstd, weight, 0.0, rows, 7)
    shifted = torch.empty(41, dtype=weight_dtype)[1:].copy_(weight)
    check_forward(simulated, x, rows, shifted, 0.0)
    check_forward(simulated, x, rows, laid_out(weight, "every_other"), 0.0)


@EACH_DTYPE
@pytest.mark.parametrize("columns", [45, 48])
def test_any_strides_give_the_same_bits(simulated, dtype, columns):
    rows, weight = as_rows([0, -1, 2, 5]), normal(columns)
    x, grad_residual, grad_h = (normal(count, columns, dtype=dtype) for count in (6, 6, 4))
    h, kept, rstd = simulated.gather_rms_norm(x, rows, weight, EPS, 0.0)
    dx, dweight = simulated.gather_rms_norm_backward(grad_residual, grad_h, kept, rstd, weight, 0.0, rows, 6, True)
    all_dx, _ = simulated.gather_rms_norm_backward(None, kept, grad_h, rstd, weight, 0.0, None, 4, False)
    for layout in LAYOUTS:
        same_h, same_kept, same_rstd = simulated.gather_rms_norm(laid_out(x, layout), rows, weight, EPS, 0.0)
        assert_same_bits(same_h, h, f"h, {layout}")
        assert_same_bits(same_kept, kept, f"kept, {layout}")
        assert_same_bits(same_rstd, rstd, f"rstd, {layout}")
        placed = [laid_out(tensor, layout) for tensor in (grad_residual, grad_h, kept)]
        results = simulated.gather_rms_norm_backward(*placed, rstd, weight, 0.0, rows, 6, True)
        assert_same_bits(results[0], dx, f"dx, {layout}")
        assert_same_bits(results[1], dweight, f"dweight, {layout}")
        strided = simulated.gather_rms_norm_backward(None, placed[2], placed[1], rstd, weight, 0.0, None, 4, False)
        assert_same_bits(strided[0], all_dx, f"dx of all rows, {layout}")
        assert_same_bits(simulated.rms_norm_rows(placed[2], rstd, weight, 0.0), h, f"h again, {layout}")


@EACH_DTYPE
def test_any_order_of_blocks_warps_and_lanes_gives_the_same_bits(simulated, dtype):
    rows, weight = torch.randperm(60)[:33].sort().values.int(), normal(2100)
    x, grad_residual, grad_h = (normal(count, 2100, dtype=dtype) for count in (60, 60, 33))
    runs = []
    for seed in range(3):
        build.set_seed(seed)
        h, kept, rstd = simulated.gather_rms_norm(x, rows, weight, EPS, 0.0)
        gradients = simulated.gather_rms_norm_backward(grad_residual, grad_h, kept, rstd, weight, 0.0, rows, 60, True)
        runs.append([h, kept, rstd, *gradients])
    for run in runs[1:]:
        for actual, expected in zip(run, runs[0], strict=True):
            assert_same_bits(actual, expected)


@EACH_DTYPE
def test_the_gradient_of_the_weight_over_many_rows(simulated, dtype):
    x, weight, grad_h = normal(301, 40, dtype=dtype), normal(40), normal(301, 40, dtype=dtype)
    _, _, rstd = simulated.gather_rms_norm(x, None, weight, EPS, 0.0)
    check_backward(simulated, None, grad_h, x, rstd, weight, 0.0, None, 301)
    rows = torch.arange(301, dtype=torch.int32)
    rows[::3] = -1
    grad_h[::3] = float("nan")  # of rows that stand for none, nothing is read
    dx, dweight = simulated.gather_rms_norm_backward(None, grad_h, x, rstd, weight, 0.0, rows, 301, True)
    grad_h[::3] = 0.0
    exact = reference.gather_rms_norm_backward(*wide(None, grad_h, x, rstd, weight), 0.0, rows, 301, True)
    own = reference.gather_rms_norm_backward(None, grad_h, x, rstd, weight, 0.0, rows, 301, True)
    assert_accurate(dweight, own[1], exact[1], "dweight")
    assert_accurate(dx, own[0], exact[0], "dx")


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
def test_nothing_to_do(simulated, shape):
    x, weight = torch.zeros(shape), torch.zeros(shape[1])
    h, kept, rstd = simulated.gather_rms_norm(x, None, weight, EPS, 0.0)
    assert h.shape == shape and kept.shape == (0, shape[1]) and rstd.shape == shape[:1]
    dx, dweight = simulated.gather_rms_norm_backward(None, x, x, rstd, weight, 0.0, None, shape[0], True)
    assert dx.shape == shape and dweight.shape == weight.shape and not dweight.any()


def test_bad_arguments_are_named(simulated):
    x, weight, rstd, rows = torch.zeros(5, 4), torch.zeros(4), torch.zeros(5), as_rows([0, 2])
    backward = simulated.gather_rms_norm_backward
    calls = {
        r"gather_rms_norm: weight must be \[4\], got float32 \[5\]": lambda: simulated.gather_rms_norm(
            x, None, rstd, EPS, 0.0
        ),
        r"gather_rms_norm: weight must be float32, .*, got int64 \[4\]": lambda: simulated.gather_rms_norm(
            x, None, weight.long(), EPS, 0.0
        ),
        r"rms_norm_rows: rstd must be float32 \[5\], got float32 \[4\]": lambda: simulated.rms_norm_rows(
            x, weight, weight, 0.0
        ),
        r"gather_rms_norm_backward: grad_h must be \[5, 4\]": lambda: backward(
            None, x[:2], x, rstd, weight, 0.0, None, 5, False
        ),
        r"gather_rms_norm_backward: rows must be \[5\]": lambda: backward(
            None, x, x, rstd, weight, 0.0, rows, 9, False
        ),
        r"gather_rms_norm_backward: total must be 5, kept's rows, without rows, got 6": lambda: backward(
            None, x, x, rstd, weight, 0.0, None, 6, False
        ),
        r"gather_rms_norm_backward: grad_residual must have .* float32, got float16": lambda: backward(
            x.half(), x, x, rstd, weight, 0.0, None, 5, False
        ),
    }
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=message):
            call()
