"""What `Reselector` refuses, and that it changes nothing then."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from peft_kernels import Reselector
from peft_kernels.nn import SparseDeltaLinear
from peft_kernels.optim import SparseSM3

from ..support.accuracy import assert_same_bits
from ..support.sparse_training import batches, layers_of, make_optimizer, small_net, train_step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": "best"}, "selection must be one of rigl, sm3, random, magnitude, fixed, got 'best'"),
        ({"schedule": "step"}, "schedule must be one of linear, cosine, got 'step'"),
        ({"total_steps": None}, "total_steps must be given"),
        ({"total_steps": 0}, "total_steps must be an integer of at least 1, got 0"),
        ({"reselection_steps": 0}, "reselection_steps must be an integer of at least 1, got 0"),
        ({"reselection_steps": 2.5}, "reselection_steps must be an integer of at least 1, got 2.5"),
        ({"selection_accumulation_steps": True}, "selection_accumulation_steps must be an integer"),
        ({"selection_accumulation_steps": 21}, "selection_accumulation_steps must be at most reselection_steps, 20"),
        ({"initial_reselection_rate": 1.5}, r"initial_reselection_rate must be in \[0, 1\], got 1.5"),
        ({"initial_reselection_rate": float("nan")}, r"initial_reselection_rate must be in \[0, 1\], got nan"),
        ({"selection": "sm3"}, 'selection "sm3" needs optim.SparseSM3, got AdamW'),
    ],
)
def test_bad_numbers_are_refused(changes, message):
    model = small_net()
    optimizer = make_optimizer("AdamW", model)
    with pytest.raises(ValueError, match=message):
        Reselector(model, optimizer, **{"total_steps": 10, **changes})
    assert all(layer.gradient_observer is None for layer in layers_of(model))


def test_a_model_without_layers_is_refused():
    linear = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(linear.parameters())
    with pytest.raises(ValueError, match="model has no SparseDeltaLinear layers"):
        Reselector(linear, optimizer, total_steps=10)
    with pytest.raises(TypeError, match="layers must be SparseDeltaLinear, got Linear as number 0"):
        Reselector([linear], optimizer, total_steps=10)
    with pytest.raises(ValueError, match="layers must be at least one SparseDeltaLinear, got none"):
        Reselector([], optimizer, total_steps=10)


def test_an_optimizer_without_the_values_is_refused():
    model = small_net()
    optimizer = torch.optim.AdamW([layers_of(model)[0].values])
    with pytest.raises(ValueError, match="optimizer must train the values of layer '2', and does not hold them"):
        Reselector(model, optimizer, total_steps=10)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got object"):
        Reselector(model, object(), total_steps=10)


def test_merged_layers_are_refused():
    model = small_net()
    optimizer = make_optimizer("AdamW", model)
    layers_of(model)[1].merge()
    with pytest.raises(ValueError, match="layer '2' is merged, so its values get no gradient; unmerge it first"):
        Reselector(model, optimizer, total_steps=10)


def test_a_layer_merged_later_stops_the_move_before_anything_has_moved():
    model = small_net()
    optimizer = make_optimizer("SparseAdamW", model)
    reselector = Reselector(model, optimizer, total_steps=10, selection_accumulation_steps=2)
    data = batches(2)
    train_step(model, optimizer, reselector, data[:1])
    x, y = data[1]
    ((model(x) - y) ** 2).mean().backward()
    optimizer.step()
    before = [layer.indices.clone() for layer in layers_of(model)]
    layers_of(model)[1].merge()
    with pytest.raises(ValueError, match="layer '2' is merged; unmerge it before its entries are reselected"):
        reselector.step()
    for layer, indices in zip(layers_of(model), before, strict=True):
        assert_same_bits(layer.indices, indices)


def test_a_layer_has_one_reselector():
    model = small_net()
    optimizer = make_optimizer("AdamW", model)
    first = Reselector(model, optimizer, total_steps=10)
    with pytest.raises(ValueError, match="layer '0' must have no gradient_observer: is it another Reselector's"):
        Reselector(model, optimizer, total_steps=10)
    first.close()
    assert all(layer.gradient_observer is None for layer in layers_of(model))
    Reselector(model, optimizer, total_steps=10)


def test_a_closed_reselector_leaves_the_training_alone():
    model = small_net()
    optimizer = make_optimizer("AdamW", model)
    reselector = Reselector(model, optimizer, total_steps=10, reselection_steps=1, selection_accumulation_steps=1)
    reselector.close()
    assert [train_step(model, optimizer, reselector, [part]) for part in batches(3)] == [0, 0, 0]


class QuantizedState(torch.optim.SGD):
    """An optimizer with a state per entry in integers."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["moment8"] = torch.zeros_like(parameter, dtype=torch.uint8)


def test_a_state_that_cannot_move_along_is_refused_before_anything_moves():
    model = small_net()
    optimizer = QuantizedState([layer.values for layer in layers_of(model)], lr=0.1)
    reselector = Reselector(model, optimizer, total_steps=10, selection_accumulation_steps=1)
    before = [layer.indices.clone() for layer in layers_of(model)]
    with pytest.raises(TypeError, match=r"state moment8 must be floating point to move along, got torch.uint8"):
        train_step(model, optimizer, reselector, batches(1))
    for layer, indices in zip(layers_of(model), before, strict=True):
        assert_same_bits(layer.indices, indices)


def test_a_shared_layer_counts_once():
    layer = layers_of(small_net())[0]
    optimizer = torch.optim.SGD([layer.values], lr=0.1)
    assert list(Reselector([layer, layer], optimizer, total_steps=10).layers) == ["0"]


def test_wrapped_models_and_optimizers_are_unwrapped():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = small_net()
    optimizer = make_optimizer("AdamW", model)
    reselector = Reselector(torch.compile(model, backend="eager"), Wrapper(optimizer), total_steps=10)
    assert list(reselector.layers) == ["0", "2"]
    assert isinstance(reselector.layers["0"], SparseDeltaLinear)


def test_sharded_values_are_refused():
    model = small_net(torch.float32)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = make_optimizer("AdamW", model)
        with pytest.raises(TypeError, match="layer '0' must hold its values in whole, got a DTensor"):
            Reselector(model, optimizer, total_steps=10)
        with pytest.raises(ValueError, match="params must be values of SparseDeltaLinear layers"):
            SparseSM3([layer.values for layer in layers_of(model)])
    finally:
        dist.destroy_process_group()
