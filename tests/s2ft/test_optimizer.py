"""`optim.SparseAdamW` and torch's optimizers on slices: the steps of a masked dense weight, weight decay included."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from peft_kernels.optim import SparseAdamW, SparseSM3

from ..support.accuracy import assert_same_bits
from ..support.s2ft_layer import KINDS
from ..support.s2ft_module import MaskedDense, random_s2ft_module, slice_of, weight_with_slice

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": 0.3}
KIND = pytest.mark.parametrize("kind", KINDS)


def assert_close_at_scale(actual, expected, units, what):
    """Within so many units in the last place of the largest number."""
    allowed = units * torch.finfo(actual.dtype).eps * expected.abs().max()
    difference = (actual - expected).abs().max() if actual.numel() else torch.zeros(())
    assert difference <= allowed, f"{what}: {difference:.2e}, allowed {allowed:.2e}"


def train(module, optimizer, steps, dtype, parts=1, after_step=lambda: None):
    """The loss of every step; each batch in `parts` of equal size, with a backward pass each."""
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(steps):
        x = torch.randn(6, 24, generator=generator, dtype=torch.float64).to(dtype)
        target = torch.randn(6, 20, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.zero_grad()
        loss = 0.0
        for part, wanted in zip(x.chunk(parts), target.chunk(parts), strict=True):
            part_loss = (module(part) - wanted).square().mean() / parts
            part_loss.backward()
            loss += part_loss.item()
        optimizer.step()
        after_step()
        losses.append(loss)
    return losses


@KIND
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("parts", [1, 3], ids=["whole batches", "accumulated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fifty_steps_are_those_of_torch_on_a_masked_dense_weight(kind, weight_decay, parts, dtype):
    layer, original = random_s2ft_module(kind, dtype)
    dense, start = MaskedDense(layer), layer.trainable.detach().clone()
    options = {**OPTIONS, "weight_decay": weight_decay}
    ours = SparseAdamW([layer.trainable], **options)
    theirs = torch.optim.AdamW([dense.weight], **options, foreach=False)
    found = train(layer, ours, 50, dtype, parts)
    expected = train(dense, theirs, 50, dtype, parts, dense.pin)
    assert (layer.trainable - start).abs().mean() > 0.1, "nothing was learned"
    # Rounding of the first steps comes back through the gradients of the later ones.
    units = 512
    assert_close_at_scale(torch.tensor(found, dtype=dtype), torch.tensor(expected, dtype=dtype), units, "losses")
    assert_close_at_scale(layer.trainable.detach(), slice_of(layer, dense.weight), units, "slice")
    assert_close_at_scale(layer.weight.detach(), dense.weight.detach(), units, "weight")
    for name in ("exp_avg", "exp_avg_sq"):
        moment = slice_of(layer, theirs.state[dense.weight][name])
        assert_close_at_scale(ours.state[layer.trainable][name], moment, units, name)
    outside = torch.ones(layer.channels, dtype=torch.bool).index_fill(0, layer.indices, False).nonzero().flatten()
    frozen = (tensor.detach().index_select(layer.axis, outside) for tensor in (layer.weight, original))
    assert_same_bits(*frozen)
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)


TORCHS = {
    "AdamW": lambda p: torch.optim.AdamW(p, **OPTIONS, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, **OPTIONS, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, **OPTIONS, fused=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.003),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.03, fused=True),
}


@KIND
@pytest.mark.parametrize("make", TORCHS.values(), ids=TORCHS.keys())
def test_torch_s_optimizers_train_the_slice_as_they_train_it_in_a_dense_weight(kind, make):
    layer, original = random_s2ft_module(kind, torch.float64)
    dense, start = MaskedDense(layer), layer.trainable.detach().clone()
    found = train(layer, make([layer.trainable]), 20, torch.float64)
    expected = train(dense, make([dense.weight]), 20, torch.float64, after_step=dense.pin)
    assert (layer.trainable - start).abs().max() > 0.03, "nothing was learned"
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-10, atol=0)
    torch.testing.assert_close(layer.trainable.detach(), slice_of(layer, dense.weight), rtol=1e-10, atol=1e-12)
    layer(torch.zeros(24, dtype=torch.float64))
    assert_same_bits(layer.weight.detach(), weight_with_slice(layer, original))


@KIND
@pytest.mark.parametrize("make", TORCHS.values(), ids=TORCHS.keys())
def test_steps_that_no_backward_pass_has_announced_are_written(kind, make):
    layer, original = random_s2ft_module(kind)
    optimizer = make([layer.trainable])
    for _ in range(3):
        layer(torch.zeros(24))
        before = layer.weight.detach().clone()
        layer.trainable.grad = torch.ones_like(layer.trainable)
        optimizer.step()
        layer(torch.zeros(24))
        assert not torch.equal(layer.weight, before)
        assert_same_bits(layer.weight.detach(), weight_with_slice(layer, original))


@KIND
@pytest.mark.parametrize("optimizer", [SparseAdamW, torch.optim.AdamW])
def test_fifty_steps_over_bfloat16_keep_a_float32_slice_rounded_once(kind, optimizer):
    layer, original = random_s2ft_module(kind, torch.bfloat16)
    dense = MaskedDense(layer)
    assert layer.trainable.dtype == dense.weight.dtype == torch.float32
    ours, theirs = optimizer([layer.trainable], **OPTIONS), torch.optim.AdamW([dense.weight], **OPTIONS)
    generator = torch.Generator().manual_seed(6)
    for _ in range(50):  # the same gradient for both: bfloat16 forwards would round their ways apart
        gradient = torch.randn(layer.trainable.shape, generator=generator)
        layer.trainable.grad = gradient.clone()
        dense.weight.grad = torch.zeros_like(dense.weight).index_copy(layer.axis, layer.indices, gradient)
        ours.step()
        theirs.step()
        layer(torch.zeros(24, dtype=torch.bfloat16))
        assert_same_bits(layer.weight.detach(), weight_with_slice(layer, original))
    assert_close_at_scale(layer.trainable.detach(), slice_of(layer, dense.weight), 16, "slice")
    assert not torch.equal(layer.trainable, layer.trainable.bfloat16().float()), "a float32 master has more digits"


def test_steps_too_small_for_bfloat16_add_up_in_the_float32_slice():
    linear = nn.Linear(24, 20, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.fill_(1.0)
    layer = type(random_s2ft_module()[0]).from_linear(linear, torch.arange(3))
    optimizer = torch.optim.SGD([layer.trainable], lr=1e-3)
    for _ in range(100):
        layer.trainable.grad = torch.ones_like(layer.trainable)
        optimizer.step()
        layer(torch.zeros(24, dtype=torch.bfloat16))
    expected = torch.full((20, 3), 0.9).bfloat16()
    torch.testing.assert_close(layer.weight[:, :3].detach(), expected, rtol=2**-7, atol=0)
    assert bool((layer.weight[:, 3:] == 1).all())


def mixed_model(seed=0):
    torch.manual_seed(seed)
    first, _ = random_s2ft_module("input", in_features=20, out_features=20, seed=seed)
    second, _ = random_s2ft_module("output", in_features=20, out_features=20, seed=seed + 10)
    return nn.Sequential(nn.Linear(24, 20), nn.LayerNorm(20), first, nn.Tanh(), second)


def groups(model):
    return [
        {"params": list(model[0].parameters()), "lr": 0.003, "weight_decay": 0.0},
        {"params": list(model[1].parameters()), "betas": (0.8, 0.9)},
        {"params": [model[2].trainable], "lr": 0.05, "eps": 1e-6},
        {"params": [model[4].trainable]},
    ]


def assert_same_training(model, twin, units=256):
    for (name, parameter), other in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert_close_at_scale(parameter.detach(), other[1].detach(), units, name)


@pytest.mark.parametrize("foreach", [False, True])
def test_ordinary_parameters_and_groups_of_their_own(foreach):
    model, twin = mixed_model(), mixed_model()
    train(model, SparseAdamW(groups(model), **OPTIONS), 20, torch.float32)
    train(twin, torch.optim.AdamW(groups(twin), **OPTIONS, foreach=foreach), 20, torch.float32)
    before = mixed_model()
    for name in ("0.weight", "2.trainable", "4.trainable"):
        assert not torch.equal(model.get_parameter(name), before.get_parameter(name))
    for module in (model, twin):
        module(torch.zeros(24))
    assert_same_training(model, twin)


@pytest.mark.parametrize("first", [SparseAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("second", [SparseAdamW, torch.optim.AdamW])
def test_state_goes_both_ways_and_training_continues_exactly(first, second, tmp_path):
    model = mixed_model()
    optimizer = first(groups(model), **OPTIONS)
    train(model, optimizer, 5, torch.float32)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = mixed_model(seed=1)
    resumed.load_state_dict(saved["model"])
    continued = second(groups(resumed))
    continued.load_state_dict(saved["optimizer"])
    for parameter in resumed.parameters():
        if parameter.requires_grad:
            assert set(continued.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
            assert continued.state[parameter]["step"] == 5
    train(model, optimizer, 5, torch.float32)
    train(resumed, continued, 5, torch.float32)
    for module in (model, resumed):
        module(torch.zeros(24))
    if first is second:
        for left, right in zip(model.parameters(), resumed.parameters(), strict=True):
            assert_same_bits(left.detach(), right.detach())
    else:
        assert_same_training(model, resumed)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_with_its_model_continues_exactly(copied):
    model = mixed_model()
    optimizer = SparseAdamW(groups(model), **OPTIONS)
    train(model, optimizer, 3, torch.float32)
    twin, other = copied((model, optimizer))
    train(model, optimizer, 3, torch.float32)
    train(twin, other, 3, torch.float32)
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(left.detach(), right.detach())


@KIND
def test_grad_scaler_unscales_and_skips(kind):
    layer, original = random_s2ft_module(kind)
    optimizer, scaler = SparseAdamW([layer.trainable], lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    twin, _ = random_s2ft_module(kind)
    reference = SparseAdamW([twin.trainable], lr=0.1)
    x = torch.ones(24)
    scaler.scale(layer(x).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    twin(x).sum().backward()
    reference.step()
    torch.testing.assert_close(layer.trainable, twin.trainable)
    before = layer.trainable.detach().clone()
    optimizer.zero_grad()
    scaler.scale(layer(x * float("inf")).nan_to_num(posinf=float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same_bits(layer.trainable.detach(), before)
    assert scaler.get_scale() == 512.0
    layer(x)
    assert_same_bits(layer.weight.detach(), weight_with_slice(layer, original))


@KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_other_strides_make_the_same_step(kind, dtype):
    results = []
    for order in (lambda g: g, lambda g: g.t().contiguous().t()):
        layer, original = random_s2ft_module(kind, dtype)
        layer.write()
        layer.trainable.grad = order(torch.randn(layer.trainable.shape, generator=torch.Generator().manual_seed(1)))
        SparseAdamW([layer.trainable], lr=0.1).step()
        assert_same_bits(layer.weight.detach(), weight_with_slice(layer, original))
        results.append(layer.trainable.detach())
    assert_same_bits(*results)


@KIND
def test_gradients_are_not_changed_and_parameters_without_one_are_left_alone(kind):
    layer, other = random_s2ft_module(kind)[0], nn.Parameter(torch.ones(3))
    optimizer = SparseAdamW([layer.trainable, other])
    other.grad = torch.ones(3)
    before = layer.trainable.detach().clone()
    optimizer.step()
    assert_same_bits(layer.trainable.detach(), before)
    assert layer.trainable not in optimizer.state and other in optimizer.state
    layer(torch.ones(24)).sum().backward()
    gradient = layer.trainable.grad.clone()
    optimizer.step()
    assert_same_bits(layer.trainable.grad, gradient)
    assert not torch.equal(layer.trainable, before)


def test_sm3_which_goes_by_entries_refuses_slices():
    layer, _ = random_s2ft_module()
    with pytest.raises(
        ValueError, match=r"params must be values of SparseDeltaLinear layers.*got a parameter \[20, 5\]"
    ):
        SparseSM3([layer.trainable])
