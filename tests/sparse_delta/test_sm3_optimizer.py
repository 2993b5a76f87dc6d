"""`optim.SparseSM3`: its steps, its state, what it writes and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft_kernels.nn import SparseDeltaLinear
from peft_kernels.optim import SparseSM3

from ..support.accuracy import assert_same_bits
from ..support.sparse_training import batches, layers_of, small_net


def values_of(model):
    return [layer.values for layer in layers_of(model)]


def train(model, optimizer, data):
    for x, y in data:
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_steps_follow_the_formula_entry_by_entry(beta):
    model = small_net()
    optimizer = SparseSM3(values_of(model), lr=0.02, beta=beta, eps=1e-6, weight_decay=0.3)
    layer = layers_of(model)[0]
    columns = layer.in_features
    row, column = [0.0] * layer.out_features, [0.0] * columns
    values, averaged = [0.0] * layer.num_deltas, [0.0] * layer.num_deltas
    for part in batches(6):
        train(model, optimizer, [part])
        second = []
        for at, position in enumerate(layer.indices.tolist()):
            g = float(layer.values.grad[at])
            u = min(row[position // columns], column[position % columns]) + g * g
            second.append((position, u))
            now = g / (u**0.5 + 1e-6) if u else 0.0
            averaged[at] = beta * averaged[at] + (1 - beta) * now
            values[at] = values[at] * (1 - 0.02 * 0.3) - 0.02 * averaged[at]
        for position, u in second:
            row[position // columns] = max(row[position // columns], u)
            column[position % columns] = max(column[position % columns], u)
        assert layer.values.tolist() == pytest.approx(values, rel=1e-9)
    state = optimizer.state[layer.values]
    assert state["row_max"].tolist() == pytest.approx(row)
    assert state["column_max"].tolist() == pytest.approx(column)
    assert ("exp_avg" in state) == (beta > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_written_by_the_step(dtype):
    model = small_net(dtype)
    before = [layer.weight.detach().clone() for layer in layers_of(model)]
    optimizer = SparseSM3(values_of(model), lr=0.1)
    train(model, optimizer, batches(3, dtype))
    for layer, weight in zip(layers_of(model), before, strict=True):
        written = layer.weight.detach().clone()
        version = layer.weight._version
        layer.write()  # nothing to do
        assert layer.weight._version == version
        expected = weight.clone()
        expected.view(-1)[layer.indices.long()] = (layer.original.float() + layer.values.detach()).to(dtype)
        assert_same_bits(written, expected)
        layer.restore_weight()
        assert_same_bits(layer.weight.detach(), weight)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_loaded_state_continues_to_the_bit(beta):
    data = batches(6, torch.float32)
    whole = small_net(torch.float32)
    train(whole, SparseSM3(values_of(whole), lr=0.1, beta=beta), data)

    first = small_net(torch.float32)
    optimizer = SparseSM3(values_of(first), lr=0.1, beta=beta)
    train(first, optimizer, data[:3])
    second = small_net(torch.float32, seed=9)
    second.load_state_dict(first.state_dict())
    other = SparseSM3(values_of(second), lr=0.7, beta=0.3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(second, other, data[3:])
    for ours, theirs in zip(values_of(second), values_of(whole), strict=True):
        assert_same_bits(ours.detach(), theirs.detach())


def test_a_merged_layers_weight_is_left_alone():
    model = small_net()
    optimizer = SparseSM3(values_of(model), lr=0.1)
    train(model, optimizer, batches(1))
    layer = layers_of(model)[0]
    layer.merge()
    weight, values = layer.weight.detach().clone(), layer.values.detach().clone()
    optimizer.step()  # the gradients are still there
    assert_same_bits(layer.weight.detach(), weight)
    assert not torch.equal(layer.values.detach(), values)


def test_a_closure_is_called_with_gradients():
    layer = layers_of(small_net())[0]
    optimizer = SparseSM3([layer.values], lr=0.1)

    def closure():
        loss = layer(torch.ones(2, 13, dtype=torch.float64)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert layer.values.abs().min() > 0


def test_parameters_that_are_no_deltas_are_refused():
    model = small_net()
    linear = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"values of SparseDeltaLinear layers.* got a parameter \[2, 3\] as number 1"):
        SparseSM3([layers_of(model)[0].values, linear.weight])
    with pytest.raises(ValueError, match=r"number 0 of group 1"):
        SparseSM3([{"params": values_of(model)}, {"params": [linear.bias], "lr": 0.1}])
    optimizer = SparseSM3(values_of(model))
    with pytest.raises(ValueError, match=r"number 0 of group 1"):
        optimizer.add_param_group({"params": linear.weight})
    assert len(optimizer.param_groups) == 1


def test_parameter_groups_have_numbers_of_their_own():
    model = small_net()
    first, second = values_of(model)
    optimizer = SparseSM3([{"params": [first]}, {"params": second, "lr": 0.0}], lr=0.1)
    train(model, optimizer, batches(1))
    assert first.abs().max() > 0
    assert second.abs().max() == 0


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"eps": float("nan")}, "eps must be at least 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"beta": 1.0}, r"beta must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_numbers_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        SparseSM3(values_of(small_net()), **numbers)


def test_a_layer_that_is_gone_is_named():
    layer = SparseDeltaLinear(5, 4, num_deltas=3)
    values = layer.values
    optimizer = SparseSM3([values])
    layer(torch.ones(1, 5)).sum().backward()
    del layer
    with pytest.raises(RuntimeError, match=r"the layer of values \[3\] is gone"):
        optimizer.step()
