"""`torch.compile` of models with layers that eliminate tokens: one graph, the same numbers."""

from __future__ import annotations

import warnings

import pytest
import torch

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
