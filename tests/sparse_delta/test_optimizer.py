"""`optim.SparseAdamW` against `torch.optim.AdamW`: deltas, ordinary parameters, groups, schedules, state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from peft_kernels.optim import SparseAdamW

from ..support.accuracy import assert_same_bits
from ..support.sparse_layer import random_module, weight_with

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": 0.3}


def assert_close_at_scale(actual, expected, units, what):
    """Within so many units in the last place of the largest number."""
    allowed = units * torch.finfo(actual.dtype).eps * expected.abs().max()
    difference = (actual - expected).abs().max() if actual.numel() else torch.zeros(())
    assert difference <= allowed, f"{what}: {difference:.2e}, allowed {allowed:.2e}"


class DenseDelta(nn.Module):
    """`x (W0 + D)^T + bias` with a dense D whose gradient is masked: what the layer must be equal to."""

    def __init__(self, layer, weight):
        super().__init__()
        self.register_buffer("weight", weight.clone())
        self.register_buffer("bias", layer.bias.detach().clone())
        self.delta = nn.Parameter(layer.values.new_zeros(weight.shape))
        self.positions = layer.indices.long()
        with torch.no_grad():
            self.delta.view(-1)[self.positions] = layer.values
        mask = torch.zeros_like(self.delta).view(-1).index_fill(0, self.positions, 1.0).view_as(self.delta)
        self.delta.register_hook(lambda gradient: gradient * mask)

    def merged(self):
        return self.weight + self.delta  # float32 under a bfloat16 weight; rounded once below

    def forward(self, x):
        return nn.functional.linear(x, self.merged().to(x.dtype), self.bias)


def train(module, optimizer, steps, dtype, after_step=lambda: None):
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(steps):
        x = torch.randn(6, 24, generator=generator, dtype=torch.float64).to(dtype)
        target = torch.randn(6, 20, generator=generator, dtype=torch.float64).to(dtype)
        loss = (module(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after_step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fifty_steps_are_those_of_torch_on_a_masked_dense_parameter(dtype, weight_decay):
    layer, original = random_module(dtype=dtype)
    dense = DenseDelta(layer, original)
    options = {**OPTIONS, "weight_decay": weight_decay}
    ours, theirs = SparseAdamW([layer.values], **options), torch.optim.AdamW([dense.delta], **options, foreach=False)
    found, expected = train(layer, ours, 50, dtype), train(dense, theirs, 50, dtype)
    # Rounding of the first steps comes back through the gradients of the later ones.
    units = 512
    assert (layer.values - random_module(dtype=dtype)[0].values).abs().mean() > 0.1, "nothing was learned"
    assert_close_at_scale(torch.tensor(found, dtype=dtype), torch.tensor(expected, dtype=dtype), units, "losses")
    assert_close_at_scale(layer.values.detach(), dense.delta.detach().view(-1)[dense.positions], units, "values")
    assert_close_at_scale(layer.weight.detach(), dense.merged().detach(), units, "weight")
    for name in ("exp_avg", "exp_avg_sq"):
        moment = theirs.state[dense.delta][name].view(-1)
        assert_close_at_scale(ours.state[layer.values][name], moment[dense.positions], units, name)
    assert not dense.delta.detach().view(-1).index_fill(0, dense.positions, 0.0).any()


def test_fifty_steps_over_bfloat16_keep_the_weight_rounded_once():
    layer, original = random_module(dtype=torch.bfloat16)
    dense = DenseDelta(layer, original)
    assert layer.values.dtype == dense.delta.dtype == torch.float32
    ours, theirs = SparseAdamW([layer.values], **OPTIONS), torch.optim.AdamW([dense.delta], **OPTIONS)
    gradients = torch.randn(50, 37, generator=torch.Generator().manual_seed(6))
    for gradient in gradients:  # the same for both: bfloat16 forwards would round their ways apart
        layer.values.grad = gradient.clone()
        dense.delta.grad = torch.zeros_like(dense.delta)
        dense.delta.grad.view(-1)[dense.positions] = gradient
        ours.step()
        theirs.step()
        assert_same_bits(layer.weight.detach(), weight_with(layer, original))
    assert_close_at_scale(layer.values.detach(), dense.delta.detach().view(-1)[dense.positions], 16, "values")
    rounded = dense.merged().detach().bfloat16()
    different = layer.weight != rounded
    assert different.sum() <= 2, "only a tie may round the other way"
    torch.testing.assert_close(layer.weight.detach(), rounded, rtol=2**-7, atol=0)


def mixed_model(seed=0):
    torch.manual_seed(seed)
    layer, _ = random_module(20, 20, seed=seed)
    return nn.Sequential(nn.Linear(24, 20), nn.LayerNorm(20), layer)


def groups(model, **options):
    return [
        {"params": list(model[0].parameters()), "lr": 0.003, "weight_decay": 0.0},
        {"params": list(model[1].parameters()), "betas": (0.8, 0.9)},
        {"params": [model[2].values], "lr": 0.05, "eps": 1e-6},
    ]


def assert_same_training(model, twin, units=256):
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close_at_scale(parameter.detach(), other.detach(), units, name)


@pytest.mark.parametrize("foreach", [False, True])
def test_ordinary_parameters_and_groups_of_their_own(foreach):
    model, twin = mixed_model(), mixed_model()
    train(model, SparseAdamW(groups(model), **OPTIONS), 20, torch.float32)
    train(twin, torch.optim.AdamW(groups(twin), **OPTIONS, foreach=foreach), 20, torch.float32)
    before = mixed_model()
    assert all(not torch.equal(a, b) for a, b in zip(model[0].parameters(), before[0].parameters(), strict=True))
    twin[2](torch.zeros(20))
    assert_same_training(model, twin)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [0.01, 0.02, 0.03], total_steps=20),
    ],
    ids=["cosine", "one cycle (changes betas)"],
)
def test_schedules(schedule):
    results = []
    for kind in (SparseAdamW, torch.optim.AdamW):
        model = mixed_model()
        optimizer = kind(groups(model), **OPTIONS)
        train(model, optimizer, 10, torch.float32, schedule(optimizer).step)
        model[2](torch.zeros(20))
        results.append(model)
    assert_same_training(*results)


def test_closures():
    layer, _ = random_module()
    optimizer = SparseAdamW([layer.values], lr=0.1)
    seen = []

    def closure():
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = layer(torch.ones(24)).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert seen == [True] and closure() < first
    assert optimizer.step() is None


def test_parameters_without_a_gradient_are_left_alone():
    layer, other = random_module()[0], nn.Parameter(torch.ones(3))
    optimizer = SparseAdamW([layer.values, other])
    other.grad = torch.ones(3)
    before = layer.values.detach().clone()
    optimizer.step()
    assert_same_bits(layer.values.detach(), before)
    assert layer.values not in optimizer.state and other in optimizer.state


def test_grad_scaler_unscales_and_skips():
    layer, original = random_module()
    optimizer, scaler = SparseAdamW([layer.values], lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    twin, _ = random_module()
    reference = SparseAdamW([twin.values], lr=0.1)
    x = torch.ones(24)
    scaler.scale(layer(x).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    twin(x).sum().backward()
    reference.step()
    torch.testing.assert_close(layer.values, twin.values)
    before = layer.values.detach().clone()
    optimizer.zero_grad()
    scaler.scale(layer(x * float("inf")).nan_to_num(posinf=float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same_bits(layer.values.detach(), before)
    assert scaler.get_scale() == 512.0
    layer(x)
    assert_same_bits(layer.weight.detach(), weight_with(layer, original))


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
    assert continued.param_groups[2]["lr"] == 0.05 and continued.param_groups[0]["weight_decay"] == 0.0
    for parameter in resumed.parameters():
        if parameter.requires_grad:
            assert set(continued.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
            assert continued.state[parameter]["step"] == 5
    train(model, optimizer, 5, torch.float32)
    train(resumed, continued, 5, torch.float32)
    resumed[2](torch.zeros(20))
    model[2](torch.zeros(20))
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "SparseAdamW has no amsgrad"),
        (lambda p: torch.optim.AdamW(p, maximize=True), "SparseAdamW has no maximize"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "SparseAdamW decays weights apart from gradients"),
    ],
)
def test_a_state_of_another_algorithm_is_refused_and_nothing_changes(make, message):
    layer, _ = random_module()
    optimizer = SparseAdamW([layer.values], lr=0.7)
    layer(torch.ones(24)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    other = make([layer.values])
    other.step()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(value, before["state"][0][name]) for name, value in after["state"][0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("which", ["parameter", "gradient", "both"])
def test_parameters_of_any_strides(dtype, which):
    values, gradient = torch.randn(5, 7).to(dtype), torch.randn(5, 7).to(dtype)

    def trained(parameter, grad):
        parameter = nn.Parameter(parameter)
        optimizer = SparseAdamW([parameter], lr=0.1, weight_decay=0.2)
        for _ in range(3):
            parameter.grad = grad
            optimizer.step()
        return parameter, optimizer.state[parameter]

    def transposed(tensor):
        return tensor.t().contiguous().t()

    expected, state = trained(values.clone(), gradient.clone())
    strided = values.clone() if which == "gradient" else transposed(values)
    found, found_state = trained(strided, gradient.clone() if which == "parameter" else transposed(gradient))
    assert_same_bits(found.detach(), expected.detach())
    assert found.stride() == strided.stride()
    for name in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(found_state[name], state[name], name)


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()], ids=str)
def test_parameters_without_elements_and_numbers(shape):
    parameter, twin = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    ours, theirs = SparseAdamW([parameter], **OPTIONS), torch.optim.AdamW([twin], **OPTIONS)
    for _ in range(3):
        parameter.grad = twin.grad = torch.ones(shape)
        ours.step()
        theirs.step()
    torch.testing.assert_close(parameter, twin)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: -1.0}, f"{name} must be at least 0, got -1.0") for name in ("lr", "eps", "weight_decay")),
        *(({name: float("nan")}, f"{name} must be at least 0, got nan") for name in ("lr", "eps", "weight_decay")),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be in \[0, 1\), got -0.1"),
        ({"betas": (0.9, float("nan"))}, r"betas\[1\] must be in \[0, 1\), got nan"),
    ],
)
def test_bad_hyperparameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SparseAdamW([nn.Parameter(torch.ones(2))], **options)


def test_sparse_gradients_are_refused_and_nothing_changes():
    plain, embedding = nn.Parameter(torch.ones(3)), nn.Embedding(4, 2, sparse=True)
    plain.grad = torch.ones(3)
    embedding(torch.tensor([1])).sum().backward()
    optimizer = SparseAdamW([plain, embedding.weight])
    with pytest.raises(RuntimeError, match="SparseAdamW takes dense gradients"):
        optimizer.step()
    assert_same_bits(plain.detach(), torch.ones(3))
    assert not optimizer.state


def test_gradients_are_not_changed():
    layer, _ = random_module()
    layer(torch.ones(24)).sum().backward()
    before = layer.values.grad.clone()
    SparseAdamW([layer.values]).step()
    assert_same_bits(layer.values.grad, before)
