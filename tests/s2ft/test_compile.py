"""The operators under `torch.compile(fullgraph=True)`: one graph for every length, results equal to eager's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from peft_kernels import ops

from ..support.s2ft_layer import KINDS, TENSORS, random_s2ft_layer, results

LENGTHS = (6, 9, 64, 33, 128, 7)  # no other size of a layer, which dynamo would take for the same one
KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [("x", "trainable"), ("trainable",), TENSORS], ids="+".join)
def test_the_layer_equals_eager(kind, dtype, trained):
    layer = random_s2ft_layer(kind, (3, 5), dtype=dtype).training(*trained)
    compiled = torch.compile(ops.s2ft_linear, fullgraph=True, backend="aot_eager")
    y = layer.call(compiled)
    found = torch.autograd.grad(y, [getattr(layer, name) for name in trained], torch.ones_like(y))
    expected = results(layer)
    torch.testing.assert_close(y.detach(), expected["y"])
    for name, gradient in zip(trained, found, strict=True):
        torch.testing.assert_close(gradient, expected[name], msg=name)


def block(gate, up, layer):
    """SwiGLU and the layer behind it, which takes its columns from there."""
    h, x_slice = ops.swiglu_s2ft(gate, up, layer.indices)
    return ops.s2ft_linear(h, layer.weight, layer.bias, layer.trainable, layer.indices, "input", x_slice=x_slice)


def inputs(length, generator, dtype):
    shape = (2, length, 24)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, "swiglu"])
def test_training_at_any_length_is_eager_training_in_one_graph(kind, dtype):
    layer = random_s2ft_layer("input" if kind == "swiglu" else kind, dtype=dtype).training("trainable")
    counter = CompileCounterWithBackend("aot_eager")

    def run(gate, up):
        return block(gate, up, layer) if kind == "swiglu" else replace(layer, x=gate * up)()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for length in LENGTHS:
        gate, up = inputs(length, torch.Generator().manual_seed(length), dtype)
        wanted = [gate, up, layer.trainable]
        expected, found = (
            torch.autograd.grad(call(gate, up).float().square().sum(), wanted) for call in (run, compiled)
        )
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(left, right)
    assert counter.frame_count == 1


def test_a_changed_length_recompiles_once_at_most():
    layer = random_s2ft_layer("input").training("trainable")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: replace(layer, x=x)(), fullgraph=True, backend=counter)
    for length in LENGTHS:
        compiled(torch.randn(2, length, 24)).sum().backward()
    assert counter.frame_count <= 2


@KIND
def test_without_gradients(kind):
    layer = random_s2ft_layer(kind).training("trainable")
    compiled = torch.compile(lambda x: replace(layer, x=x)(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(layer.x), layer())


@KIND
def test_checkpointing_inside_a_compiled_function(kind):
    layer = random_s2ft_layer(kind, (3,), 24, 24).training("trainable")

    def twice(x):
        return replace(layer, x=replace(layer, x=x)().tanh())()

    (expected,) = torch.autograd.grad(twice(layer.x).square().sum(), layer.trainable)
    compiled = torch.compile(lambda x: checkpoint(twice, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(layer.x).square().sum(), layer.trainable)
    torch.testing.assert_close(found, expected)


def test_inductor_computes_a_block_as_eager_does():
    layer = random_s2ft_layer("input").training("trainable")
    gate, up = inputs(6, torch.Generator().manual_seed(0), torch.float32)
    wanted = [gate, up, layer.trainable]
    compiled = torch.compile(lambda gate, up: block(gate, up, layer), fullgraph=True)
    expected = torch.autograd.grad(block(gate, up, layer).square().sum(), wanted)
    for left, right in zip(torch.autograd.grad(compiled(gate, up).square().sum(), wanted), expected, strict=True):
        torch.testing.assert_close(left, right)
