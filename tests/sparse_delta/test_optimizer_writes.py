"""What any optimizer does to `values` is in the weight at the next forward, also where torch does not count it."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.nn import SparseDeltaLinear

from ..support.accuracy import assert_same_bits
from ..support.sparse_training import batches, layers_of, make_optimizer, small_net

WAYS = [{"fused": True}, {"foreach": True}, {"foreach": False}]


def assert_written(layer: SparseDeltaLinear) -> None:
    expected = layer.original + layer.values.detach()
    assert_same_bits(layer.weight.detach().view(-1)[layer.indices.long()], expected)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(f"{name}={value}" for name, value in way.items()))
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_steps_of_torchs_optimizers_are_written(kind, way):
    model = small_net(torch.float32)
    optimizer = kind([layer.values for layer in layers_of(model)], lr=0.1, **way)
    for x, y in batches(3, torch.float32):
        ((model(x) - y) ** 2).mean().backward()
        before = [layer.values.detach().clone() for layer in layers_of(model)]
        optimizer.step()
        optimizer.zero_grad()
        model(x)
        for layer, values in zip(layers_of(model), before, strict=True):
            assert not torch.equal(layer.values, values)
            assert_written(layer)


@pytest.mark.parametrize("name", ["SparseAdamW", "SparseSM3"])
def test_steps_of_our_optimizers_are_written_once(name):
    model = small_net(torch.float32)
    optimizer = make_optimizer(name, model)
    for x, y in batches(3, torch.float32):
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()
        versions = [layer.weight._version for layer in layers_of(model)]
        for layer in layers_of(model):
            assert_written(layer)
        model(x)
        assert [layer.weight._version for layer in layers_of(model)] == versions
