"""What only Super-Tuning has: values in the order of magnitude, and Supra's factors with their dropout."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.nn.merged import layer_of as keeper_of
from peft_kernels.nn.switched import Positions

from .peft_models import KINDS, adapted, layer_of, small, sparse, twins, values_of, weight_of

pytestmark = pytest.mark.skipif(len(KINDS) == 1, reason="this PEFT has no Super-Tuning")


def test_values_keep_peft_s_order():
    model, twin, _ = twins(small("super"))
    layer = layer_of(twin)
    indices = layer.supertuning_indices["default"].long()
    assert not torch.equal(indices, indices.sort().values), "in order already; nothing is tested"
    twin(torch.randn(3, 11))
    expected = weight_of(layer_of(model)).view(-1)[indices] + values_of(layer)
    torch.testing.assert_close(weight_of(layer).view(-1)[indices], expected)


def test_gradients_are_the_same_bits_in_every_run():
    _, twin, _ = twins(small("super"))
    x = torch.randn(64, 11)
    found = []
    for _ in range(3):
        twin.zero_grad()
        twin(x).square().sum().backward()
        found.append(values_of(layer_of(twin)).grad.clone())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_sparse_adamw_trains_them_and_leaves_the_weight_to_the_layer():
    model, twin, _ = twins(small("super"))
    x = torch.randn(4, 11)
    for each, kind in ((model, torch.optim.AdamW), (twin, pk.optim.SparseAdamW)):
        optimizer = kind([values_of(layer_of(each))], lr=0.05)
        for _ in range(4):
            each.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    assert keeper_of(values_of(layer_of(twin))) is None
    torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)


def test_dropout_follows_the_dropout_module():
    model = small("supra", lora_dropout=0.5)
    pk.accelerate(model)
    layer, x = layer_of(model), torch.randn(50, 11)
    torch.manual_seed(0)
    first = layer(x)
    assert not torch.equal(layer(x), first), "a new mask for each call"
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
    dense = copy.deepcopy(layer)
    pk.restore(dense)
    dense.supertuning_rank["default"] = 0  # PEFT's sign for no factors
    layer.supertuning_lora_dropout["default"].p = 1.0
    torch.testing.assert_close(layer(x), dense(x))
    layer.supertuning_lora_dropout["default"].p = 0.5
    model.eval()
    expected = layer(x)
    pk.restore(model)
    torch.testing.assert_close(layer(x), expected)


def test_dropout_is_on_the_way_into_the_factors_only():
    torch.manual_seed(0)
    model = small("supra", lora_dropout=0.5)
    layer, x = layer_of(model), torch.randn(2000, 11)
    pk.accelerate(model)
    mean = torch.stack([layer(x) for _ in range(60)]).mean(0)
    model.eval()
    exact = layer(x)
    assert (mean - exact).norm() < 0.25 * exact.norm()
    with torch.no_grad():
        layer.supertuning_lora_B["default"].weight.zero_()
    model.train()
    assert torch.equal(layer(x), layer(x)), "values and base weight see no dropout"


@pytest.mark.parametrize("part", ["supertuning_lora_A", "supertuning_lora_B", "supertuning_lora_dropout"])
def test_hooks_on_the_factors_are_left_to_peft(part):
    model, twin, _ = twins(small("supra", lora_dropout=0.1))
    seen = []
    for each in (model, twin):
        getattr(layer_of(each), part)["default"].register_forward_hook(lambda *args: seen.append(args))
    assert "a module inside it has hooks" in pk.accelerate(twin).left_alone[0].reason
    x, outputs = torch.randn(3, 11), []
    for each in (model, twin):
        torch.manual_seed(0)
        outputs.append(each(x))
    assert torch.equal(*outputs) and len(seen) == 2


def test_a_global_hook_is_seen_by_the_factors():
    _, twin, _ = twins(small("supra"))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        twin(torch.randn(3, 11))
    finally:
        handle.remove()
    assert layer_of(twin).supertuning_lora_A["default"] in seen


def test_adapters_with_and_without_factors():
    model = small("supra")
    model.add_adapter("plain", sparse.peft.SupertuningConfig(sparsity=0.8, target_modules=["0"], init_weights=False))
    model, twin, _ = twins(model)
    x = torch.randn(4, 11)
    for name in ("plain", "default"):
        for each in (model, twin):
            each.set_adapter(name)
        torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)
        assert pk.accelerate(twin).fused


def test_nothing_of_a_dropped_model_stays_alive():
    _, twin, _ = twins(adapted("super"))
    twin(torch.zeros(1, 3, dtype=torch.int64)).logits.sum().backward()
    weight = weakref.ref(weight_of(twin.base_model.model.model.layers[0].mlp.up_proj))
    del twin
    gc.collect()
    assert weight() is None


def test_positions_of_any_order():
    flat = torch.tensor([7, 2, 30, 0], dtype=torch.int32)
    positions = Positions.of(flat, 31)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    assert positions.indices.tolist() == [0, 2, 7, 30] and positions.indices.dtype == torch.int32
    arranged = positions.arranged(values)
    assert arranged.tolist() == [4.0, 2.0, 1.0, 3.0]
    arranged.backward(torch.tensor([10.0, 20.0, 30.0, 40.0]))
    assert values.grad.tolist() == [30.0, 20.0, 40.0, 10.0]
    assert torch.autograd.gradgradcheck(positions.arranged, values.detach().double().requires_grad_())
    ordered = Positions.of(positions.indices.long(), 31)
    assert ordered.order is None and ordered.arranged(values) is values
    empty = Positions.of(flat[:0], 31)
    assert empty.indices.numel() == 0


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ([3, 1, 3], "indices must be unique, got 3"),
        ([3, 31], r"indices must be in \[0, 31\), got 31"),
        ([3, -1], r"indices must be in \[0, 31\), got -1"),
    ],
)
def test_bad_positions_are_refused(flat, message):
    with pytest.raises(ValueError, match=message):
        Positions.of(torch.tensor(flat), 31)
    with pytest.raises(TypeError, match="indices must be int32 or int64"):
        Positions.of(torch.tensor(flat).float(), 31)
