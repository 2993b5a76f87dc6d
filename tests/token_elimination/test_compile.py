"""Blocks of kept tokens under `torch.compile(fullgraph=True)`: one graph for every length, gradients those of eager."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from peft_kernels import ops
from peft_kernels.ops import recompute

from ..support.token_elimination import rows_of

HIDDEN, WIDE, RANK = 24, 40, 4
LENGTHS = (50, 9, 64, 33, 128, 7)  # the first with no size of a layer, which dynamo would take for the same one


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block(x, rows, cos, sin, norm, gate, up, factor_a, factor_b, down):
    """Every public operator once, with offers, in something like a layer."""
    residual, h, (kept, rstd) = ops.split_rms_norm(x * 1, rows, norm, 1e-6, owned=True)
    with recompute.offered(h, *recompute.norm_recipe(kept, rstd, norm)):
        turned = ops.lora_linear(h, gate[:HIDDEN], None, factor_a, factor_b, 0.5)
    turned = ops.rope_rows(turned.view(-1, 3, HIDDEN // 3), cos, sin, rows).view(-1, HIDDEN)
    residual = ops.scatter_add_rows(residual, turned, rows, in_place=True)
    h = ops.gather_rows(residual, rows)
    inner = ops.swiglu(h @ gate.t(), h @ up.t())
    with recompute.offered(inner, *recompute.swiglu_recipe(h @ gate.t(), h @ up.t())):
        return ops.gather_linear_scatter(inner, down, None, rows, residual, gathered=True)


def tensors(dtype):
    generator = torch.Generator().manual_seed(3)
    shapes = ((HIDDEN,), (WIDE, HIDDEN), (WIDE, HIDDEN), (RANK, HIDDEN), (HIDDEN, RANK), (HIDDEN, WIDE))
    return [(torch.randn(shape, generator=generator) / 5).to(dtype).requires_grad_() for shape in shapes]


def inputs(length, dtype):
    x = torch.randn((2, length, HIDDEN), generator=torch.Generator().manual_seed(length)).to(dtype).requires_grad_()
    angle = torch.arange(2 * length * 8).view(2 * length, 8).float()
    return x, rows_of("sequences", 2 * length, seed=length), angle.cos(), angle.sin()


def gradients(function, x, rows, cos, sin, weights):
    y = function(x, rows, cos, sin, *weights)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *weights])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_at_any_length_is_eager_training_in_one_graph(dtype):
    counter, weights = CompileCounterWithBackend("aot_eager"), tensors(dtype)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    compilations = set()
    for length in LENGTHS:
        # Eager first: what it enters into the table of kernels is something that a compiled function depends on.
        expected = gradients(block, *inputs(length, dtype), weights)
        found = gradients(compiled, *inputs(length, dtype), weights)
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(left, right)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1, "another length compiled it again"


def onto_x(x, rows, weight):
    return ops.gather_linear_scatter(x, weight, None, rows, x)


@pytest.mark.parametrize("trained", [False, True])
def test_a_layer_onto_its_own_input(trained):
    weight = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_(trained)
    x, rows, *_ = inputs(9, torch.float32)
    wanted = [x, weight] if trained else [x]
    compiled = torch.compile(onto_x, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(x, rows, weight).square().sum(), wanted) for f in (compiled, onto_x)]
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


def changed(x, rows, weight):
    return ops.gather_linear_scatter(x.sin(), weight, None, rows, x * 2, in_place=True)


def test_a_change_in_place_is_compiled():
    weight = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x, rows, *_ = inputs(9, torch.float32)
    compiled = torch.compile(changed, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, changed):
        y = function(x, rows, weight)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, weight])])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


def test_the_operator_that_changes_its_argument_is_compiled():
    def inference(out, x, rows, weight):
        torch.ops.peft_kernels.gather_linear_scatter_(out, x, weight, None, rows, True, False)
        return out.sum()

    generator = torch.Generator().manual_seed(0)
    x, weight, out = (torch.randn(9, 9, generator=generator) for _ in range(3))
    rows = rows_of("sequences", 9)
    expected = out.clone()
    total = inference(expected, x, rows, weight)
    found = torch.compile(inference, fullgraph=True, backend="aot_eager_decomp_partition")(out, x, rows, weight)
    torch.testing.assert_close(found, total)
    torch.testing.assert_close(out, expected)


def test_checkpointing_inside_a_compiled_function():
    weights, call = tensors(torch.float32), inputs(9, torch.float32)

    def checkpointed(*arguments):
        return checkpoint(block, *arguments, use_reentrant=False)

    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    for left, right in zip(gradients(compiled, *call, weights), gradients(block, *call, weights), strict=True):
        torch.testing.assert_close(left, right)
