"""`ops.attach_delta` and `ops.reordered`: gradients of a delta behind any product with the weight that holds it."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

import peft_kernels as pk
from peft_kernels.reference import sparse_delta as reference

from ..support.sparse_delta import random_delta

N, K, NNZ = 9, 13, 31


def example(dtype=torch.float64, values_dtype=None, rows=(5,), index_dtype=torch.int32):
    """x, weight with the delta in it, values and indices."""
    delta = random_delta((N, K), NNZ, dtype=dtype, values_dtype=values_dtype or dtype, index_dtype=index_dtype)
    reference.scatter_write_(delta.weight, delta.indices, delta.original, delta.values)
    x = torch.randn(*rows, K, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), delta.weight, delta.values.requires_grad_(), delta.indices


def attached(x, weight, values, indices):
    return pk.ops.attach_delta(F.linear(x, weight), x, values, indices)


@pytest.mark.parametrize("rows", [(5,), (2, 3), (), (0,), (1,)])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_y_is_unchanged_and_values_get_their_gradient(rows, index_dtype):
    x, weight, values, indices = example(rows=rows, index_dtype=index_dtype)
    y = attached(x, weight, values, indices)
    assert torch.equal(y, F.linear(x, weight))
    dy = torch.randn_like(y)
    dx, dvalues = torch.autograd.grad(y, (x, values), dy)
    expected_y = reference.sparse_delta_linear(x, weight, None, values, indices)
    expected = torch.autograd.grad(expected_y, (x, values), dy)
    torch.testing.assert_close((dx, dvalues), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16])
def test_gradients_come_in_the_values_dtype(dtype, values_dtype):
    x, weight, values, indices = example(dtype, values_dtype, rows=(40,))
    y = attached(x, weight, values, indices)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert values.grad.dtype == values_dtype
    exact = (dy.double().t() @ x.double()).flatten()[indices.long()]
    tolerance = 1e-5 if values_dtype == torch.float32 else 1e-2
    assert (values.grad - exact).norm() <= tolerance * exact.norm()


def test_it_may_be_differentiated_twice():
    x, weight, values, indices = example()
    first = torch.autograd.grad(attached(x, weight, values, indices).pow(3).sum(), (x, values), create_graph=True)
    found = torch.autograd.grad(sum(each.pow(2).sum() for each in first), (x, values))
    y = reference.sparse_delta_linear(x, weight, None, values, indices)
    first = torch.autograd.grad(y.pow(3).sum(), (x, values), create_graph=True)
    expected = torch.autograd.grad(sum(each.pow(2).sum() for each in first), (x, values))
    torch.testing.assert_close(found, expected)


def test_frozen_values_cost_nothing():
    x, weight, values, indices = example()
    values = values.detach()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = pk.ops.attach_delta(F.linear(x, weight).detach().requires_grad_(), x, values, indices)
    assert not any(tensor is x for tensor in saved)
    y.sum().backward()
    assert values.grad is None


def test_nothing_but_x_values_and_indices_is_saved():
    x, weight, values, indices = example()
    y = F.linear(x, weight).detach().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pk.ops.attach_delta(y, x, values, indices)
    assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr(), values.data_ptr(), indices.data_ptr()}


def test_under_autocast_the_gradient_is_of_what_was_multiplied():
    x, weight, values, indices = example(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = attached(x, weight, values, indices)
    assert y.dtype == torch.bfloat16
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = (dy.double().t() @ x.bfloat16().double()).flatten()[indices.long()]
    assert (values.grad - exact).norm() <= 1e-5 * exact.norm()


def test_transforms_and_compiling():
    x, weight, values, indices = example(torch.float32)
    plain = torch.autograd.grad(attached(x, weight, values, indices).square().sum(), values)[0]

    def loss(values):
        return attached(x.detach(), weight, values, indices).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(values.detach()), plain)
    compiled = torch.compile(attached, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x, weight, values, indices).square().sum(), values)[0]
    torch.testing.assert_close(found, plain)


def test_the_reference_backend_serves_it():
    x, weight, values, indices = example(torch.float32)
    plain = torch.autograd.grad(attached(x, weight, values, indices).square().sum(), values)[0]
    with pk.use_backend("reference"):
        found = torch.autograd.grad(attached(x, weight, values, indices).square().sum(), values)[0]
    torch.testing.assert_close(found, plain)


BAD = {
    "rows": ({"x": torch.zeros(4, K)}, ValueError, "x must be [..., K] with y's rows, [5], got float32 [4, 13]"),
    "integer": ({"x": torch.zeros(5, K, dtype=torch.int64)}, TypeError, "y and x must be floating point"),
    "double": ({"values": torch.zeros(NNZ, dtype=torch.float64)}, TypeError, "values must be float32, bfloat16 or"),
    "index dtype": ({"indices": torch.zeros(NNZ, dtype=torch.int16)}, TypeError, "indices must be int32 or int64"),
    "length": ({"values": torch.zeros(NNZ - 1)}, ValueError, "of the same length, got float32 [30] and int32 [31]"),
    "device": ({"x": torch.zeros(5, K, device="meta")}, ValueError, "x must be on y's device, cpu, got meta"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(change, error, message):
    x, weight, values, indices = example(torch.float32)
    arguments = {"y": F.linear(x, weight), "x": x, "values": values, "indices": indices, **change}
    with pytest.raises(error, match=re.escape(message)):
        pk.ops.attach_delta(**arguments)


def test_reordered_gathers_both_ways():
    order = torch.randperm(17, generator=torch.Generator().manual_seed(3))
    inverse = order.argsort()
    values = torch.randn(17, dtype=torch.float64, requires_grad=True)
    y = pk.ops.reordered(values, order, inverse)
    assert torch.equal(y, values[order])
    grad = torch.randn(17, dtype=torch.float64)
    y.backward(grad)
    assert torch.equal(values.grad[order], grad)
    for index_dtype in (torch.int32, torch.int64):
        arranged = lambda v, t=index_dtype: pk.ops.reordered(v, order.to(t), inverse.to(t))  # noqa: E731
        assert torch.autograd.gradcheck(arranged, (values,)) and torch.autograd.gradgradcheck(arranged, (values,))
    torch.testing.assert_close(
        torch.func.grad(lambda v: (pk.ops.reordered(v, order, inverse) * grad).sum())(values.detach()), values.grad
    )
