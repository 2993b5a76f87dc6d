"""`nn.SparseDeltaLinear` as a module: construction, what it shares and keeps, training, positions, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from peft_kernels.nn import LoRALinear, SparseDeltaLinear
from peft_kernels.optim import SparseAdamW

from ..support.accuracy import assert_same_bits
from ..support.sparse_layer import random_module, weight_with

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COPIES = pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)


def positions(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_formula(shape, bias):
    layer, original = random_module(dtype=torch.float64, bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    expected = nn.functional.linear(x, weight_with(layer, original), layer.bias)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_layer_computes_what_its_linear_does(dtype):
    linear = nn.Linear(24, 20, dtype=dtype)
    weight, x = linear.weight.detach().clone(), torch.randn(3, 24).to(dtype)
    expected = linear(x)
    layer = SparseDeltaLinear.from_linear(linear, density=0.1)
    assert_same_bits(layer(x).detach(), expected.detach())
    assert_same_bits(layer.weight.detach(), weight)
    assert layer.num_deltas == 48 and not layer.values.any()


def test_from_linear_shares_and_freezes_the_parameters():
    linear = nn.Linear(24, 20).eval()
    linear.note = "kept"
    weight, bias = linear.weight, linear.bias
    layer = SparseDeltaLinear.from_linear(linear, num_deltas=5)
    assert layer.weight is weight and layer.bias is bias
    assert not weight.requires_grad and not bias.requires_grad
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["values"]
    assert not layer.training and layer.note == "kept"
    assert sorted(layer.state_dict()) == ["bias", "indices", "original", "values", "weight"]
    assert list(linear._parameters) == ["weight", "bias"] and not linear._buffers, "the linear layer got nothing new"


def test_over_leaves_the_layer_as_it_is():
    linear = nn.Linear(24, 20)
    layer = SparseDeltaLinear.over(linear, num_deltas=5)
    assert linear.weight.requires_grad and linear.bias.requires_grad and layer.weight is linear.weight


def test_hooks_come_along_and_their_handles_remove_them():
    linear = nn.Linear(24, 20)
    seen = []
    handle = linear.register_forward_hook(lambda module, args, output: seen.append(output))
    layer = SparseDeltaLinear.from_linear(linear, num_deltas=5)
    y = layer(torch.randn(3, 24))
    assert len(seen) == 1 and seen[0] is y
    handle.remove()
    layer(torch.randn(3, 24))
    assert len(seen) == 1


def changed(change):
    linear = nn.Linear(6, 4)
    change(linear)
    return linear


class Subclass(nn.Linear):
    """Could compute anything."""


def transposed(linear):
    linear.weight = nn.Parameter(torch.zeros(6, 4).t())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Embedding(4, 4), "it is a nn.Embedding, not an nn.Linear"),
        (lambda: Subclass(4, 4), "Subclass, whose own forward would be lost"),
        (lambda: LoRALinear(4, 4), "LoRALinear, whose own forward would be lost"),
        (lambda: SparseDeltaLinear(4, 4, num_deltas=1), "SparseDeltaLinear, whose own forward would be lost"),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), "its weight is parametrized"),
        (lambda: changed(transposed), r"its weight is not contiguous \(strides \[1, 4\]\)"),
        (
            lambda: changed(lambda linear: setattr(linear, "weight", nn.Parameter(torch.zeros(4, 6).int(), False))),
            "its weight is int32",
        ),
        (lambda: changed(lambda linear: setattr(linear, "forward", abs)), "its forward is replaced on the instance"),
        (lambda: changed(lambda linear: linear._register_state_dict_hook(print)), "it has state_dict hooks"),
    ],
)
def test_what_cannot_be_replaced_is_refused_with_the_reason(make, message):
    linear = make()
    before = [parameter.requires_grad for parameter in linear.parameters()]
    with pytest.raises(TypeError, match=message):
        SparseDeltaLinear.from_linear(linear, num_deltas=1)
    assert [parameter.requires_grad for parameter in linear.parameters()] == before


BAD_OPTIONS = [
    ({}, "give either density or num_deltas, got density=None, num_deltas=None"),
    ({"density": 0.1, "num_deltas": 3}, "give either density or num_deltas"),
    *(({"density": value}, r"density must be in \(0, 1\], got") for value in (0.0, -0.1, 1.1, float("nan"), "1", True)),
    *(
        ({"num_deltas": value}, r"num_deltas must be an integer in \[0, 24\], got")
        for value in (-1, 25, 2.0, "1", True)
    ),
    ({"num_deltas": 1, "selection": "largest"}, "selection must be one of random, magnitude, got 'largest'"),
    ({"num_deltas": 1, "adapter_dtype": torch.int8}, "adapter_dtype must be float32, .*, got torch.int8"),
    (
        {"num_deltas": 1, "adapter_dtype": torch.float64},
        "adapter_dtype must be .*got torch.float64 over a torch.float3",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_hyperparameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SparseDeltaLinear(6, 4, **options)
    linear = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=message):
        SparseDeltaLinear.from_linear(linear, **options)
    assert linear.weight.requires_grad


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (positions(0, 7, 3), ValueError, "indices must be sorted, got 3 at position 2 after 7"),
        (positions(0, 3, 3), ValueError, "indices must be unique, got 3"),
        (positions(0, 24), ValueError, r"indices must be in \[0, 24\), got 24"),
        (positions(-1, 2), ValueError, r"indices must be in \[0, 24\), got -1"),
        (torch.arange(25), ValueError, "indices must be at most as many as the weight has elements, 24"),
        (torch.tensor([[1]]), ValueError, "indices must be 1-D"),
        (torch.tensor([1.0]), TypeError, "indices must be int32 or int64, got float32"),
        (torch.tensor([True]), TypeError, "indices must be int32 or int64, got bool"),
    ],
)
def test_bad_positions_are_refused_and_nothing_changes(indices, error, message):
    linear = nn.Linear(6, 4)
    with pytest.raises(error, match=message):
        SparseDeltaLinear.from_linear(linear, indices=indices)
    assert linear.weight.requires_grad
    layer, original = random_module(6, 4, indices.numel() if indices.numel() < 25 else 3)
    layer(torch.zeros(6))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=message):
        layer.set_delta(indices)
    state = {**layer.state_dict(), "indices": indices, "weight": torch.zeros(4, 6)}
    with pytest.raises(RuntimeError, match="indices"):
        layer.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)


def test_positions_and_a_count_at_once_are_refused():
    with pytest.raises(ValueError, match="give density, num_deltas or indices, got more than one of them"):
        SparseDeltaLinear.from_linear(nn.Linear(6, 4), indices=positions(1), num_deltas=1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_given_positions_train_and_no_other(dtype):
    linear = nn.Linear(6, 4)
    weight = linear.weight.detach().clone()
    layer = SparseDeltaLinear.from_linear(linear, indices=positions(0, 7, 23, dtype=dtype))
    assert layer.indices.dtype == torch.int32 and layer.indices.tolist() == [0, 7, 23]
    with torch.no_grad():
        layer.values.fill_(1.0)
    layer(torch.zeros(6))
    moved = (layer.weight.detach() - weight).flatten()
    torch.testing.assert_close(moved, torch.zeros(24).index_fill(0, torch.tensor([0, 7, 23]), 1.0))


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_values_are_float32_over_half_precision_unless_told_otherwise(dtype, adapter_dtype, expected):
    layer = SparseDeltaLinear(24, 20, num_deltas=9, dtype=dtype, adapter_dtype=adapter_dtype)
    y = layer(torch.randn(3, 24, dtype=dtype))
    y.sum().backward()
    assert y.dtype == layer.original.dtype == dtype
    assert layer.values.dtype == layer.values.grad.dtype == expected


def test_selections():
    linear = nn.Linear(60, 50)
    layer = SparseDeltaLinear.from_linear(linear, density=0.02, selection="magnitude")
    chosen = linear.weight.detach().abs().flatten()
    least = chosen[layer.indices.long()].min()
    assert layer.num_deltas == 60 and (chosen > least).sum() == 59
    assert (layer.indices[1:] > layer.indices[:-1]).all()
    drawn = SparseDeltaLinear.from_linear(nn.Linear(60, 50), density=0.5)
    assert drawn.num_deltas == 1500 and (drawn.indices[1:] > drawn.indices[:-1]).all()
    assert abs(drawn.indices.double().mean() - 1499.5) < 5 * 3000 / (12 * 3000) ** 0.5, "drawn evenly"


@pytest.mark.parametrize("density", [0.01, 0.2, 0.3, 1.0])
def test_one_seed_gives_one_choice_and_leaves_torch_alone(density):
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return SparseDeltaLinear.from_linear(linear, density=density, generator=generator).indices

    linear = nn.Linear(60, 50)
    state = torch.get_rng_state()
    assert torch.equal(drawn(5), drawn(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn(5), drawn(6)) == (density == 1.0)


def test_density_one_trains_every_entry_as_the_dense_layer_does():
    linear = nn.Linear(6, 4).double()
    dense = copy.deepcopy(linear)
    layer = SparseDeltaLinear.from_linear(linear, density=1.0)
    x = torch.randn(5, 6, dtype=torch.float64)
    ours, theirs = torch.optim.SGD([layer.values], lr=0.1), torch.optim.SGD([dense.weight], lr=0.1)
    for _ in range(5):
        for module, optimizer in ((layer, ours), (dense, theirs)):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    layer(x)
    torch.testing.assert_close(layer.weight, dense.weight)


def test_a_layer_with_no_entries_is_the_frozen_one():
    layer = SparseDeltaLinear(24, 20, num_deltas=0)
    x = torch.randn(3, 24, requires_grad=True)
    optimizer = SparseAdamW([layer.values])
    layer(x).sum().backward()
    optimizer.step()
    assert layer.values.grad.shape == (0,)
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 24))


def test_gradients_accumulate_exactly_over_calls_and_backward_passes():
    layer, _ = random_module(dtype=torch.float64)
    x, y = torch.randint(-3, 4, (2, 3, 24)).double()
    direction = torch.randint(-3, 4, (20,)).double()  # sums of small integers are exact
    (layer(torch.cat([x, y])) @ direction).sum().backward()
    together = layer.values.grad.clone()
    layer.zero_grad()
    (layer(x) @ direction).sum().backward()
    (layer(y) @ direction).sum().backward()
    assert_same_bits(layer.values.grad, together)
    layer.zero_grad()
    ((layer(x) @ direction).sum() + (layer(y) @ direction).sum()).backward()
    assert_same_bits(layer.values.grad, together)


def test_frozen_values_get_no_gradient():
    layer, _ = random_module()
    layer.values.requires_grad_(False)
    x = torch.randn(3, 24, requires_grad=True)
    layer(x).sum().backward()
    assert layer.values.grad is None and x.grad is not None


def test_a_trained_bias_gets_its_gradient():
    layer, _ = random_module()
    layer.bias.requires_grad_(True)
    layer(torch.randn(3, 24)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((20,), 3.0))


def test_the_gradient_observer_is_called_in_backward():
    layer, _ = random_module()
    seen = []
    layer.gradient_observer = lambda dy, x: seen.append((dy.clone(), x.clone()))
    x = torch.randn(2, 3, 24)
    y = layer(x)
    assert not seen
    y.sum().backward()
    ((dy, rows),) = seen
    assert_same_bits(dy, torch.ones(6, 20))
    assert_same_bits(rows, x.view(6, 24))


@COPIES
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_compute_the_same_and_share_nothing(copied, written, merged):
    layer, original = random_module()
    x = torch.randn(3, 24)
    if written:
        layer(x)
    if merged:
        layer.merge()
    twin = copied(layer)
    expected = layer(x).detach()
    assert twin.merged == merged
    assert_same_bits(twin(x).detach(), expected)
    if merged:
        twin.unmerge()
    optimizer = SparseAdamW([twin.values], lr=0.1)
    twin(x).sum().backward()
    optimizer.step()
    assert_same_bits(twin.weight.detach(), weight_with(twin, original))
    assert_same_bits(layer(x).detach(), expected)
    twin.restore_weight()
    assert_same_bits(twin.weight.detach(), original)


def test_set_delta_moves_the_delta_and_restores_where_it_was():
    layer, original = random_module()
    layer(torch.zeros(24))
    parameter, free = layer.values, torch.ones(480, dtype=torch.bool).index_fill(0, layer.indices.long(), False)
    elsewhere = free.nonzero().flatten()[:37]
    values = torch.randn(37)
    layer.set_delta(elsewhere, values)
    assert layer.values is parameter and torch.equal(layer.indices, elsewhere.int())
    assert_same_bits(layer.values.detach(), values)
    layer(torch.zeros(24))
    assert_same_bits(layer.weight.detach(), weight_with(layer, original))
    layer.set_delta(torch.arange(37))
    assert not layer.values.any()
    layer(torch.zeros(24))
    assert_same_bits(layer.weight.detach(), original)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_and_values_that_were_given_stay_the_caller_s(dtype):
    indices, moved, values = positions(0, 7, 23, dtype=dtype), positions(1, 2, 3, dtype=dtype), torch.ones(3)
    layer = SparseDeltaLinear.from_linear(nn.Linear(6, 4), indices=indices)
    layer.set_delta(moved, values)
    layer.set_delta(positions(4, 5, 6), torch.zeros(3))
    assert indices.tolist() == [0, 7, 23] and moved.tolist() == [1, 2, 3] and values.tolist() == [1.0, 1.0, 1.0]


def test_set_delta_refuses_what_does_not_fit_and_changes_nothing():
    layer, _ = random_module()
    layer(torch.zeros(24))
    before = copy.deepcopy(layer.state_dict())
    for arguments, message in (
        ((torch.arange(36),), r"indices must be \[37\], as before, got \[36\]"),
        ((torch.arange(37), torch.zeros(36)), r"values must be \[37\] to match indices, got \[36\]"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.set_delta(*arguments)
    layer.merge()
    with pytest.raises(ValueError, match="the delta is merged; unmerge it before moving it"):
        layer.set_delta(torch.arange(37))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_read_original_takes_a_weight_changed_by_hand():
    layer, _ = random_module()
    layer.restore_weight()
    other = torch.randn(20, 24)
    with torch.no_grad():
        layer.weight.copy_(other)
    layer.read_original()
    layer(torch.zeros(24))
    assert_same_bits(layer.weight.detach(), weight_with(layer, other))
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), other)


def test_a_layer_made_on_the_meta_device_is_initialized_when_it_gets_memory():
    layer = SparseDeltaLinear(400, 20, num_deltas=100, device="meta").to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="made on the meta device and is not filled yet; load a state_dict into it"):
        layer(torch.zeros(400))
    layer.reset_parameters()
    assert 0.045 < layer.weight.abs().max() <= 0.05 and not layer.values.any()
    assert (layer.indices[1:] > layer.indices[:-1]).all() and layer.indices[0] >= 0 and layer.indices[-1] < 8000
    layer(torch.zeros(400)).sum().backward()
    original = layer.weight.detach().clone()
    with torch.no_grad():
        layer.values.add_(1.0)
    layer(torch.zeros(400))
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)


def test_resetting_draws_everything_anew():
    layer, _ = random_module(selection="magnitude")
    layer(torch.zeros(24))
    layer.reset_parameters()
    weight = layer.weight.detach().clone()
    largest = weight.abs().flatten().topk(37).indices.sort().values
    assert torch.equal(layer.indices.long(), largest) and not layer.values.any()
    layer(torch.zeros(24))
    assert_same_bits(layer.weight.detach(), weight)


def test_repr_says_what_the_layer_is():
    layer, _ = random_module()
    expected = "SparseDeltaLinear(in_features=24, out_features=20, bias=True, num_deltas=37 (7.708%))"
    assert repr(layer) == expected
    layer.merge()
    assert repr(layer) == expected[:-1] + ", merged=True)"
