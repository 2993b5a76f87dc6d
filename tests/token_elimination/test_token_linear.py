"""What `gather_linear_scatter` casts, gathers, keeps and refuses: under autocast, and where nothing is recorded."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from peft_kernels import ops
from peft_kernels.ops import recompute, token_linear

from ..support.accuracy import assert_same_bits
from ..support.token_elimination import rows_of

HALF = torch.bfloat16


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class HalfTensors(TorchDispatchMode):
    """How many elements each tensor has that is made in the autocast dtype."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == HALF:
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("pattern", ["none", "one", "some", "only_holes"])
@pytest.mark.parametrize("onto", ["x", "float32", "bfloat16", None])
@pytest.mark.parametrize("trained", [False, True])
def test_autocast_casts_kept_rows_alone(pattern, onto, trained):
    rows, x = rows_of(pattern, 12), numbers(3, 4, 5).requires_grad_()
    width = 5 if onto == "x" else 3  # what has the result's size is then smaller than x
    weight, bias = numbers(width, 5, seed=1).requires_grad_(trained), numbers(width, seed=2)
    other = numbers(3, 4, width, seed=3)
    residual = {"x": x, "float32": other, "bfloat16": other.to(HALF), None: None}[onto]
    made = HalfTensors()
    with made, torch.autocast("cpu", HALF):
        y = ops.gather_linear_scatter(x, weight, bias, rows, residual)
    assert max(made.sizes) < x.numel()

    present = (rows >= 0).nonzero()[:, 0]
    kept = rows[present].long()
    product = linear(x.view(12, 5)[kept].to(HALF), weight.to(HALF), bias.to(HALF))
    if residual is None:
        expected = product.new_zeros(rows.shape[0], width).index_add(0, present, product)
    else:
        expected = residual.reshape(12, width).index_add(0, kept, product.to(residual.dtype)).view(3, 4, width)
    assert_same_bits(y + 0.0, expected + 0.0)
    wanted = [x, weight] if trained else [x]
    for found, own in zip(
        *(torch.autograd.grad(result.float().square().sum(), wanted) for result in (y, expected)), strict=True
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, own, atol=0.1, rtol=0.05)


# What is changed about a call that works, the error, the message.
WRONG = {
    "rows of residual": ({"residual": torch.ones(9, 5)}, ValueError, r"residual must be \[4, 5\] .*, got .* \[9, 5\]"),
    "width of residual": ({"residual": torch.ones(4, 6)}, ValueError, r"residual must be \[4, 5\] .*, got .* \[4, 6\]"),
    "integer residual": ({"residual": torch.ones(4, 5).int()}, TypeError, "residual must be float32, .*, got int32"),
    "residual elsewhere": ({"residual": torch.ones(4, 5, device="meta")}, ValueError, "residual must be on .* on meta"),
    "strided residual": (
        {"residual": torch.ones(5, 4).t(), "in_place": True},
        ValueError,
        "residual must be contiguous to be changed in place",
    ),
    "leaf": (
        {"residual": torch.ones(4, 5, requires_grad=True), "in_place": True},
        ValueError,
        "residual must be neither a leaf",
    ),
    "integer weight": ({"weight": torch.ones(5, 3).int()}, TypeError, "weight must be float32, .*, got int32"),
    "weight elsewhere": ({"weight": torch.ones(5, 3, device="meta")}, ValueError, "weight must be on x's .* on meta"),
    "width of weight": ({"weight": torch.ones(5, 4)}, ValueError, r"weight must be \[N, 3\] .*, got .* \[5, 4\]"),
    "length of bias": ({"bias": torch.ones(4)}, ValueError, r"bias must be \[5\] .*, got .* \[4\]"),
    "indices": ({"indices": torch.tensor([1])}, TypeError, "indices must be int32, got int64"),
    "float64 x": ({"x": torch.ones(4, 3).double()}, TypeError, "weight must have x's dtype, torch.float64"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_autocast_refuses_what_is_refused_without(case, dtype, monkeypatch):
    """float32 is another dtype than the product's, bfloat16 the same."""
    changes, error, message = WRONG[case]
    arguments = {
        "x": torch.ones(4, 3),
        "weight": torch.ones(5, 3),
        "bias": torch.ones(5),
        "indices": torch.tensor([0, 2], dtype=torch.int32),
        "residual": torch.ones(4, 5, dtype=dtype),
    }
    if "residual" in changes and changes["residual"].is_floating_point():
        changes = changes | {"residual": changes["residual"].detach().to(dtype).requires_grad_(case == "leaf")}
    with torch.autocast("cpu", HALF):
        ops.gather_linear_scatter(**arguments)
        monkeypatch.setattr(token_linear, "_kernel", lambda *_: pytest.fail("a kernel ran"))
        monkeypatch.setattr(token_linear, "gather_rows", lambda *_: pytest.fail("a kernel ran"))
        with pytest.raises(error, match=f"^gather_linear_scatter: {message}"):
            ops.gather_linear_scatter(**arguments | changes)


@pytest.fixture
def calls(monkeypatch):
    """The operators that were called, each with its argument `gather` where it has one."""
    found, kernel = [], token_linear._kernel

    def recorded(name, *arguments):
        def call(*tensors):
            found.append((name, tensors[-2]) if "linear" in name else (name,))
            return kernel(name, *arguments)(*tensors)

        return call

    monkeypatch.setattr(token_linear, "_kernel", recorded)
    return found


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_rows_are_gathered_once(calls, in_place, dtype):
    rows, x, weight = rows_of("sequences", 12), numbers(12, 5).to(dtype), numbers(7, 5, seed=1).to(dtype)
    product, results = "gather_linear_scatter_" if in_place else "gather_linear_scatter", []
    for recording, trained in ((True, True), (True, False), (False, True)):
        with torch.set_grad_enabled(recording):
            residual = numbers(12, 7, seed=2).to(dtype)
            weight.requires_grad_(trained)
            results.append(ops.gather_linear_scatter(x, weight, None, rows, residual, in_place=in_place))
        if recording and trained:  # the rows that are kept for backward are those that the product reads
            assert calls == [("gather_rows",), (product, False)]
        else:
            assert calls == [(product, True)]
        calls.clear()
    assert results[0].requires_grad and not results[2].requires_grad
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_no_offer_is_taken_where_nothing_is_recorded():
    rows, x, weight = rows_of("some", 12), numbers(12, 5), numbers(7, 5, seed=1).requires_grad_()
    kept = ops.gather_rows(x, rows)
    offer = recompute.offered(kept, (x,), lambda source: ops.gather_rows(source, rows))
    with offer, torch.no_grad():
        ops.gather_linear_scatter(kept, weight, None, rows, gathered=True)
    assert offer._recipe._consumers == 0, "backward would hold the formed rows for a layer that never comes"
    with offer:
        ops.gather_linear_scatter(kept, weight, None, rows, gathered=True)
    assert offer._recipe._consumers == 1
