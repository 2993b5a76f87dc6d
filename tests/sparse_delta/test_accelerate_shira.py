"""What only SHiRA has: a scaling of each adapter, indices as rows and columns, an optimizer that writes back."""

from __future__ import annotations

import copy

import pytest
import torch

import peft_kernels as pk
from peft_kernels.nn.merged import layer_of as keeper_of

from .peft_models import adapted, assert_same_state, holds_delta, layer_of, small, tokens, twins, values_of, weight_of


def gradient(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return values_of(layer_of(model)).grad.clone()


def test_a_scaling_can_be_set_at_any_time():
    model, twin, _ = twins(small("shira"))
    x = torch.randn(4, 11)
    for scale in (1.0, 0.3, 2.0, 0.0, 1.0):
        for each in (model, twin):
            layer_of(each).set_scale("default", scale)
        torch.testing.assert_close(twin(x), model(x))
        torch.testing.assert_close(gradient(twin, x), gradient(model, x), rtol=1e-5, atol=1e-5)
        assert holds_delta(layer_of(twin))
    layer_of(twin).set_scale("absent", 3.0)
    assert_same_state(model, twin)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_in_another_order_are_sorted_by_us(dtype):
    model = small("shira")
    layer = layer_of(model)
    order = torch.randperm(layer.shira_indices["default"].shape[1])
    layer.shira_indices["default"] = layer.shira_indices["default"][:, order].to(dtype)
    model, twin, report = twins(model)
    x = torch.randn(4, 11)
    assert report.fused
    torch.testing.assert_close(twin(x), model(x))
    torch.testing.assert_close(gradient(twin, x), gradient(model, x), rtol=1e-5, atol=1e-5)
    assert keeper_of(values_of(layer_of(twin))) is None, "its values are not in the order of the weight"


@pytest.mark.parametrize("wrong", [-1, 7])
def test_indices_outside_the_weight_are_left_to_peft(wrong):
    model = small("shira")
    layer_of(model).shira_indices["default"][0, 3] = wrong
    assert pk.accelerate(model).left_alone[0].reason == "its indices are not all inside the weight, [7, 11]"


def test_sparse_adamw_writes_the_values_back(monkeypatch):
    _, twin, _ = twins(small("shira"))
    theirs = copy.deepcopy(twin)
    x, layer = torch.randn(4, 11), layer_of(twin)
    ours = pk.optim.SparseAdamW([values_of(layer)], lr=0.05, weight_decay=0.1)
    torch_s = torch.optim.AdamW([values_of(layer_of(theirs))], lr=0.05, weight_decay=0.1)
    writes = []
    original = pk.nn.switched.write_delta
    monkeypatch.setattr(pk.nn.switched, "write_delta", lambda *args: writes.append(args[0]) or original(*args))
    for _ in range(5):
        for each, optimizer in ((twin, ours), (theirs, torch_s)):
            gradient(each, x)
            optimizer.step()
    assert sum(weight is weight_of(layer) for weight in writes) == 1, "the optimizer writes the others"
    torch.testing.assert_close(twin(x), theirs(x))
    torch.testing.assert_close(values_of(layer), values_of(layer_of(theirs)))
    original_weight = weight_of(layer_of(small("shira")))
    assert torch.equal(layer.base_layer.weight, original_weight)


def test_the_optimizer_leaves_a_weight_alone_that_holds_something_else():
    model, twin, _ = twins(small("shira"))
    layer, x = layer_of(twin), torch.randn(4, 11)
    values = values_of(layer)
    optimizer = pk.optim.SparseAdamW([values], lr=0.05)
    gradient(twin, x)
    assert keeper_of(values) is not None
    weight = layer.base_layer.weight  # restored
    assert keeper_of(values) is None
    optimizer.step()
    assert torch.equal(weight, weight_of(layer_of(model)))
    layer.set_scale("default", 2.0)
    twin(x)
    assert keeper_of(values) is None, "the optimizer knows no scaling"
    layer.set_scale("default", 1.0)
    twin(x)
    assert keeper_of(values) is not None
    layer.set_scale("default", 2.0)  # after forward, before the step: what it writes is not what the next call needs
    optimizer.step()
    twin(x)
    expected = weight_of(layer_of(model)).view(-1).clone()
    rows, columns = layer.shira_indices["default"].long()
    expected[rows * 11 + columns] += 2.0 * values.detach()
    torch.testing.assert_close(weight_of(layer).view(-1), expected)


def test_the_optimizer_notices_what_a_compiled_call_has_done():
    model, twin, _ = twins(small("shira"))
    values, x = values_of(layer_of(twin)), torch.randn(4, 11)
    optimizer = pk.optim.SparseAdamW([values], lr=0.05)
    gradient(twin, x)
    compiled = torch.compile(twin, backend="aot_eager")
    with torch.no_grad(), twin.disable_adapter():
        torch.testing.assert_close(compiled(x), model.base_model.model[0].base_layer(x))
    optimizer.step()
    assert torch.equal(weight_of(layer_of(twin)), weight_of(layer_of(model)))
    with torch.no_grad():
        values_of(layer_of(model)).copy_(values)
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(twin(x), model(x))


def test_sparse_adamw_trains_a_model_as_torch_s_does():
    model = adapted("shira", init_weights=True)
    _, twin, _ = twins(model)
    curves = []
    for each, kind in ((model, torch.optim.AdamW), (twin, pk.optim.SparseAdamW)):
        optimizer = kind([p for p in each.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.1)
        curve = []
        for _ in range(12):
            loss = each(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-5, atol=0)
    assert curves[0][-1] < curves[0][0]
