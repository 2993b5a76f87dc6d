"""`torch.compile` of models with layers that eliminate tokens: one graph, the same numbers."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import peft_kernels
from peft_kernels import LoraConfig

from .models import BLOCK, assert_same_gradients, build, eliminated, gradients, layers_of, tokens


def test_a_training_step_is_one_graph():
    model = build(dtype=torch.float32, num_hidden_layers=2)
    peft_kernels.inject(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), seed=1)
    eliminated(model, layers=[0, 1], score="attention", select_every=2)
    ids = tokens()
    expected = model(input_ids=ids, labels=ids).loss
    wanted = gradients(model, expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        loss = compiled(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        assert_same_gradients(gradients(model, loss), wanted, 1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(input_ids=ids, labels=ids)


def checkpointed(call, use_reentrant):
    return lambda x, tables: checkpoint(call, x, tables, use_reentrant=use_reentrant)


@pytest.mark.parametrize(
    ("kind", "score"), [("inside", "norm"), ("non-reentrant", "attention"), ("reentrant", "random")]
)
def test_a_compiled_layer_under_activation_checkpointing(kind, score):
    """Backward computes the layer anew, for the same tokens. Within a graph there is the non-reentrant kind alone."""
    model = build(dtype=torch.float32, num_hidden_layers=1)
    layer = peft_kernels.nn.TokenElimination(layers_of(model)[0], 0.5, BLOCK, score)
    torch._dynamo.reset()
    options = {"fullgraph": True, "backend": "aot_eager"}

    def eager(x, tables):
        return layer(x, position_embeddings=tables)

    if kind == "inside":
        compiled = torch.compile(checkpointed(eager, False), **options)
    else:
        compiled = checkpointed(torch.compile(eager, **options), kind == "reentrant")
    results = []
    for call in (eager, compiled):
        layer.zero_grad()
        torch.manual_seed(1)
        x = torch.randn(2, 22, 16, requires_grad=True)
        y = call(x, model.model.rotary_emb(x, torch.arange(22)[None]))
        y.square().sum().backward()  # the reentrant kind allows nothing else
        results.append({"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}})
    assert_same_gradients(results[1], results[0], 1e-5)


def test_another_keep_ratio_is_another_graph():
    model = build(dtype=torch.float32, num_hidden_layers=1)
    layer = peft_kernels.nn.TokenElimination(layers_of(model)[0], 0.5, 1, "random", apply_to="mlp")
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(2, 20, 16)
    tables = model.model.rotary_emb(x, torch.arange(20)[None])
    after_attention = x + layer.self_attn(layer.input_layernorm(x), position_embeddings=tables, attention_mask=None)[0]
    for ratio, graphs in ((0.5, 1), (0.6, 2), (0.75, 3), (0.6, 3)):
        peft_kernels.elimination.set_keep_ratio(compiled, ratio)
        results = []
        for call in (layer, compiled):
            torch.manual_seed(1)
            results.append(call(x, position_embeddings=tables))
        torch.testing.assert_close(*results)
        changed = ((results[1] - after_attention).abs() > 1e-4).any(-1).sum(1)
        assert changed.tolist() == [round(20 * ratio)] * 2 and counter.frame_count == graphs


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"keep": 0.5, "score": "random"}, 22),
        ({"keep": 0.5, "score": "norm", "threshold": 0.2, "apply_to": "mlp"}, 22),
        ({"keep": 0.5, "score": "norm"}, 7),
    ],
    ids=str,
)
def test_a_layer_is_one_graph(options, length):
    model = build(dtype=torch.float32, num_hidden_layers=1)
    layer = peft_kernels.nn.TokenElimination(layers_of(model)[0], block_size=BLOCK, **options)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, length, 16)
    tables = model.model.rotary_emb(x, torch.arange(length)[None])
    results = []
    for call in (layer, compiled):
        torch.manual_seed(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(call(x, position_embeddings=tables))
        said = [str(item.message) for item in caught if "does nothing" in str(item.message)]
        assert len(said) == (length == 7), "a graph that drops nothing says so when it is made"
    assert torch.equal(*results)
