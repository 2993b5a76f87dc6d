"""`lora_linear` under `torch.compile(fullgraph=True)`: one graph, equal results, our operators both ways."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import peft_kernels
from peft_kernels import ops

from ..support.accuracy import assert_same_bits
from ..support.lora import TENSORS, gradients, random_layer
from ..support.places import LAYER_OPERATORS, places

EACH_BACKEND = pytest.mark.parametrize("place", places(*LAYER_OPERATORS))
KERNELS = [param for param in places(*LAYER_OPERATORS) if param.values[0].backend != "reference"]
COMPILED = pytest.mark.parametrize("place", KERNELS)

# The reference's dropout traces into hundreds of nodes: seconds per graph, so one test of each kind is enough for it.
WITH_DROPOUT = pytest.mark.parametrize(
    ("place", "dropout_p"),
    [
        pytest.param(*param.values, dropout_p, id=f"{param.id}-{dropout_p}", marks=param.marks)
        for param in places(*LAYER_OPERATORS)
        for dropout_p in ((0.0, 0.3) if param in KERNELS else (0.0,))
    ],
)


class Graphs:
    """A compiler that runs graphs as they are and keeps them, one list per direction."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []
        self.backend = aot_autograd(
            fw_compiler=self._keep(self.forward),
            bw_compiler=self._keep(self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )

    @staticmethod
    def _keep(graphs):
        def compile_graph(graph, _example_inputs):
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        return compile_graph

    @staticmethod
    def operators(graph) -> set[str]:
        """The names of our operators that a graph calls."""
        targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        # Inside torch.compile an in-place operator is called through a wrapper; the text of the graph names it anyway.
        return {str(target).split(".")[1] for target in targets if str(target).startswith("peft_kernels")}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def function(dropout_p):
    """`lora_linear` of five tensors, so that they are inputs of the graph and not constants."""

    def call(x, weight, bias, lora_a, lora_b):
        return ops.lora_linear(x, weight, bias, lora_a, lora_b, 1.7, dropout_p, True)

    return call


def seeded(call, layer):
    torch.manual_seed(3)
    return call(*layer.tensors().values())


def forward_and_gradients(call, layer, place):
    with peft_kernels.use_backend(place.backend):
        y = seeded(call, layer)
    return {"y": y.detach(), **gradients(y, torch.ones_like(y), layer)}


@WITH_DROPOUT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [TENSORS, ("x", "lora_a", "lora_b"), ("lora_b",)], ids="+".join)
def test_compiled_equals_eager(place, dtype, dropout_p, trained):
    layer = random_layer((3, 5), dtype=dtype, factor_dtype=torch.float32, device=place.device).training(*trained)
    compiled = torch.compile(function(dropout_p), fullgraph=True, backend="aot_eager")
    actual = forward_and_gradients(compiled, layer, place)
    expected = forward_and_gradients(function(dropout_p), layer, place)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype
        torch.testing.assert_close(tensor, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@COMPILED
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiled_graphs_call_our_operators_in_both_directions(place, dropout_p):
    graphs = Graphs()
    layer = random_layer((3, 5), device=place.device).training("x", "lora_a", "lora_b")
    forward_and_gradients(torch.compile(function(dropout_p), fullgraph=True, backend=graphs.backend), layer, place)
    (forward,), (backward,) = graphs.forward, graphs.backward
    assert Graphs.operators(forward) == {"lora_linear_forward"}
    assert Graphs.operators(backward) == {"lora_linear_backward"}


@COMPILED
def test_compiled_graph_keeps_no_mask_and_nothing_of_output_size(place):
    graphs = Graphs()
    layer = random_layer((64,), 48, 40, 4, device=place.device).training("x", "lora_a", "lora_b")
    forward_and_gradients(torch.compile(function(0.3), fullgraph=True, backend=graphs.backend), layer, place)
    (forward,) = graphs.forward
    outputs = [node.meta["val"] for node in forward.graph.find_nodes(op="output")[0].args[0]]
    y, *saved = [value for value in outputs if isinstance(value, torch.Tensor)]
    assert y.shape == (64, 40)
    allowed = {"x": (64, 48), "weight": (40, 48), "lora_a": (4, 48), "lora_b": (40, 4), "hidden": (64, 4), "rng": (2,)}
    for tensor in saved:
        assert tuple(tensor.shape) in allowed.values() or tuple(reversed(tensor.shape)) in allowed.values()
        assert tensor.dtype != torch.bool
    # x itself at most once: a dropped copy would be a second one.
    assert sum(tuple(tensor.shape) == (64, 48) for tensor in saved) <= 1


@WITH_DROPOUT
@pytest.mark.parametrize("how", ["dynamic", "mark_dynamic"])
def test_every_sequence_length_runs_in_one_graph(place, dropout_p, how):
    graphs = Graphs()
    compiled = torch.compile(
        function(dropout_p), fullgraph=True, backend=graphs.backend, dynamic=True if how == "dynamic" else None
    )
    for length in (5, 9, 64, 33, 128, 7):
        layer = random_layer((2, length), device=place.device).training("x", "lora_a", "lora_b")
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(layer.x, 1)
        actual = forward_and_gradients(compiled, layer, place)
        expected = forward_and_gradients(function(dropout_p), layer, place)
        for name, tensor in actual.items():
            torch.testing.assert_close(tensor, expected[name])
    assert len(graphs.forward) == 1
    assert len(graphs.backward) == 1


@EACH_BACKEND
def test_a_changed_length_recompiles_once_at_most(place):
    graphs = Graphs()
    compiled = torch.compile(function(0.0), fullgraph=True, backend=graphs.backend)
    for length in (5, 9, 64, 33, 128, 7):
        forward_and_gradients(compiled, random_layer((length,), device=place.device).training("lora_a"), place)
    assert len(graphs.forward) <= 2


@COMPILED
def test_compiled_dropout_draws_a_new_mask_per_call(place):
    layer = random_layer((8,), device=place.device)
    with peft_kernels.use_backend(place.backend):
        compiled = torch.compile(function(0.5), fullgraph=True, backend="aot_eager")
        first = seeded(compiled, layer)
        second = compiled(*layer.tensors().values())
        again = seeded(compiled, layer)
    assert_same_bits(again, first)
    assert not torch.equal(second, first)


@EACH_BACKEND
def test_changing_the_backend_recompiles(place):
    layer = random_layer((8,), device=place.device)
    compiled = torch.compile(function(0.0), fullgraph=True, backend="aot_eager")
    with peft_kernels.use_backend("reference"):
        expected = seeded(compiled, layer)
    with peft_kernels.use_backend(place.backend):
        torch.testing.assert_close(seeded(compiled, layer), expected)
    graphs = Graphs()
    compiled = torch.compile(function(0.0), fullgraph=True, backend=graphs.backend)
    for backend in ("reference", place.backend):
        with peft_kernels.use_backend(backend):
            seeded(compiled, layer)
    used = [bool(Graphs.operators(graph)) for graph in graphs.forward]
    assert used == ([False] if place.backend == "reference" else [False, True])


@COMPILED
def test_checkpointing_inside_a_compiled_function_keeps_the_mask(place):
    layer = random_layer((6, 7), device=place.device).training("x", "lora_a", "lora_b")

    def checkpointed(*tensors):
        return checkpoint(function(0.4), *tensors, use_reentrant=False)

    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager_decomp_partition")
    actual = forward_and_gradients(compiled, layer, place)
    expected = forward_and_gradients(function(0.4), layer, place)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


@COMPILED
def test_inductor(place):
    # With x = 1, identity factors and no weight, y shows the mask of the forward and dx that of the backward.
    features = 64
    x = torch.ones(400, features, device=place.device, requires_grad=True)
    weight = torch.zeros(features, features, device=place.device)
    lora_a, lora_b = torch.eye(features, device=place.device), torch.eye(features, device=place.device)

    def chain(x, weight, lora_a, lora_b):
        return ops.lora_linear(x * 1.0, weight, None, lora_a, lora_b, 1.0, 0.25, True) * 3.0

    compiled = torch.compile(chain, fullgraph=True)
    with peft_kernels.use_backend(place.backend):
        torch.manual_seed(1)
        y = compiled(x, weight, lora_a, lora_b)
        torch.manual_seed(1)
        again = compiled(x, weight, lora_a, lora_b)
        other = compiled(x, weight, lora_a, lora_b)
    assert_same_bits(again.detach(), y.detach())
    assert not torch.equal(other, y)
    assert set(y.detach().unique().tolist()) == {0.0, 4.0}
    rate = (y == 0).double().mean().item()
    assert abs(rate - 0.25) < 5 * (0.25 * 0.75 / y.numel()) ** 0.5
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(dx, y.detach())


FIRST_CALL = """
import sys, torch, peft_kernels
x, weight, lora_a, lora_b = torch.ones(3, 8), torch.ones(5, 8), torch.ones(2, 8, requires_grad=True), torch.ones(5, 2)
call = torch.compile(peft_kernels.ops.lora_linear, fullgraph=True, backend="aot_eager")
if sys.argv[1] == "default":
    call(x, weight, None, lora_a, lora_b, 1.0).sum().backward()
else:
    with peft_kernels.use_backend(sys.argv[1]):
        call(x, weight, None, lora_a, lora_b, 1.0).sum().backward()
assert lora_a.grad.eq(15).all()
"""


@pytest.mark.parametrize("backend", ["default", "reference"])
def test_first_call_of_a_process_may_be_a_compiled_one(backend):
    # In this process other calls may have chosen the backends before, so that tracing finds the choice made.
    done = subprocess.run([sys.executable, "-c", FIRST_CALL, backend], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
