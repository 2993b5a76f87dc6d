"""The layer under `torch.compile(fullgraph=True)`: one graph for every length, training equal to eager's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from peft_kernels import ops
from peft_kernels.optim import SparseAdamW

from ..support.accuracy import assert_same_bits
from ..support.sparse_layer import random_module, random_sparse_layer, results, weight_with


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [("x", "values"), ("values",), ("x", "weight", "bias", "values")], ids="+".join)
def test_the_operator_equals_eager(dtype, trained):
    layer = random_sparse_layer((3, 5), dtype=dtype).training(*trained)
    compiled = torch.compile(ops.sparse_delta_linear, fullgraph=True, backend="aot_eager")
    y = compiled(layer.x, layer.weight, layer.bias, layer.values, layer.indices)
    wanted = [getattr(layer, name) for name in trained]
    found = torch.autograd.grad(y, wanted, torch.ones_like(y))
    expected = results(layer)
    torch.testing.assert_close(y.detach(), expected["y"])
    for name, gradient in zip(trained, found, strict=True):
        torch.testing.assert_close(gradient, expected[name], msg=name)


def trained(layer, run, make_optimizer, lengths):
    """Losses of one step for each length."""
    optimizer = make_optimizer([layer.values])
    generator = torch.Generator().manual_seed(2)
    losses = []
    for length in lengths:
        x = torch.randn(2, length, 24, generator=generator).to(layer.weight.dtype)
        optimizer.zero_grad()
        loss = run(x).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


LENGTHS = (5, 9, 64, 33, 128, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make_optimizer",
    [lambda p: SparseAdamW(p, lr=0.05), lambda p: torch.optim.AdamW(p, lr=0.05), lambda p: torch.optim.SGD(p, lr=0.5)],
    ids=["SparseAdamW", "AdamW", "SGD"],
)
def test_training_at_any_length_is_eager_training_in_one_graph(dtype, make_optimizer):
    layer, original = random_module(dtype=dtype)
    twin = copy.deepcopy(layer)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend=counter)
    expected = trained(layer, layer, make_optimizer, LENGTHS)
    found = trained(twin, compiled, make_optimizer, LENGTHS)
    assert counter.frame_count == 1
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(twin.values, layer.values)
    twin(torch.zeros(24, dtype=dtype))  # eager again
    assert_same_bits(twin.weight.detach(), weight_with(twin, original))
    twin.restore_weight()
    assert_same_bits(twin.weight.detach(), original)


def test_a_changed_length_recompiles_once_at_most():
    layer, _ = random_module()
    counter = CompileCounterWithBackend("aot_eager")
    trained(layer, torch.compile(layer, fullgraph=True, backend=counter), lambda p: torch.optim.SGD(p, 0.1), LENGTHS)
    assert counter.frame_count <= 2


def test_eager_and_compiled_calls_alternate():
    layer, original = random_module()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 24)
    for step in range(4):
        with torch.no_grad():
            layer.values.mul_(-1.5)
        run, other = (compiled, layer) if step % 2 else (layer, compiled)
        first = run(x).detach()
        assert_same_bits(layer.weight.detach(), weight_with(layer, original))
        torch.testing.assert_close(other(x).detach(), first)


def test_a_merged_layer_compiles():
    layer, _ = random_module()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 24)
    expected = compiled(x).detach()
    layer.merge()
    torch.testing.assert_close(compiled(x), expected)
    layer.unmerge()
    torch.testing.assert_close(compiled(x).detach(), expected)


def test_checkpointing_inside_a_compiled_function():
    layer, _ = random_module(24, 24)
    x = torch.randn(3, 24)

    def block(x):
        return layer(layer(x).tanh())

    block(x).square().sum().backward()
    expected = layer.values.grad.clone()
    layer.zero_grad()
    compiled = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    torch.testing.assert_close(layer.values.grad, expected)


def test_inductor_trains_a_model_as_eager_does():
    model = nn.Sequential(random_module()[0], nn.Tanh())
    twin = copy.deepcopy(model)

    def losses(model, run):
        optimizer = SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        x = torch.randn(4, 24, generator=torch.Generator().manual_seed(3))
        found = []
        for _ in range(4):
            loss = run(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return torch.tensor(found)

    expected = losses(model, model)
    assert expected[-1] < 0.9 * expected[0]
    torch.testing.assert_close(losses(twin, torch.compile(twin, fullgraph=True)), expected, rtol=1e-4, atol=0)
