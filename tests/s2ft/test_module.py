"""`nn.S2FTLinear` as a module: construction, what it shares and keeps, training, its channels, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from peft_kernels.nn import LoRALinear, S2FTConv1D, S2FTLinear, SparseDeltaLinear
from peft_kernels.optim import SparseAdamW

from ..support.accuracy import assert_same_bits
from ..support.s2ft_layer import DIMS, KINDS, parted
from ..support.s2ft_module import (
    COUNT,
    Conv1D,
    drop_in,
    plain_layer,
    random_s2ft_module,
    slice_of,
    weight_with_slice,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DIM = pytest.mark.parametrize("dim", DIMS)
KIND = pytest.mark.parametrize("kind", KINDS)
LAYER = pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
COPIES = pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)


def channels(*numbers, dtype=torch.int64):
    return torch.tensor(numbers, dtype=dtype)


@KIND
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_formula(kind, shape, bias):
    layer, original = random_s2ft_module(kind, torch.float64, bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.oriented(weight_with_slice(layer, original)), layer.bias)
    torch.testing.assert_close(layer(x), expected)


@KIND
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_dense_layer(kind, dtype):
    layer, original = random_s2ft_module(kind, dtype)
    x = torch.randint(-3, 4, (2, 3, 24)).to(dtype)  # products and sums of small integers are exact
    y = torch.randint(-3, 4, (2, 3, 20)).to(dtype)
    weight = weight_with_slice(layer, original).requires_grad_()
    found_x, expected_x = (x.clone().requires_grad_() for _ in range(2))
    layer(found_x).backward(y)
    nn.functional.linear(expected_x, layer.oriented(weight), layer.bias).backward(y)
    assert_same_bits(layer.trainable.grad.to(dtype), slice_of(layer, weight.grad))
    torch.testing.assert_close(found_x.grad, expected_x.grad)
    assert layer.weight.grad is None and layer.bias.grad is None


@KIND
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_layer_computes_what_its_linear_does(kind, dtype):
    dim, transposed = parted(kind)
    linear = plain_layer(transposed, dtype=dtype)
    weight, x = linear.weight.detach().clone(), torch.randn(3, 24).to(dtype)
    expected = linear(x)
    layer = drop_in(transposed).from_linear(linear, ratio=0.25, dim=dim)
    assert_same_bits(layer(x).detach(), expected.detach())
    assert_same_bits(layer.weight.detach(), weight)
    assert layer.num_channels == layer.channels // 4 == (6 if dim == "input" else 5)
    assert_same_bits(layer.trainable.detach().to(dtype), slice_of(layer, weight))
    assert_same_bits(layer.original, slice_of(layer, weight))
    assert not layer.change().any()


@LAYER
def test_from_linear_shares_and_freezes_the_parameters(transposed):
    linear = plain_layer(transposed).eval()
    linear.note = "kept"
    weight, bias = linear.weight, linear.bias
    layer = drop_in(transposed).from_linear(linear, num_channels=5)
    assert layer.weight is weight and layer.bias is bias
    assert not weight.requires_grad and not bias.requires_grad
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["trainable"]
    assert not layer.training and layer.note == "kept"
    assert sorted(layer.state_dict()) == ["bias", "indices", "original", "trainable", "weight"]
    assert list(linear._parameters) == ["weight", "bias"] and not linear._buffers, "the linear layer got nothing new"


@LAYER
def test_over_leaves_the_layer_as_it_is(transposed):
    linear = plain_layer(transposed)
    layer = drop_in(transposed).over(linear, num_channels=5)
    assert linear.weight.requires_grad and linear.bias.requires_grad and layer.weight is linear.weight


@LAYER
def test_hooks_come_along_and_their_handles_remove_them(transposed):
    linear = plain_layer(transposed)
    seen = []
    handle = linear.register_forward_hook(lambda module, args, output: seen.append(output))
    layer = drop_in(transposed).from_linear(linear, num_channels=5)
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


class ConvSubclass(Conv1D):
    """Could compute anything, too."""


def of_other_strides(linear):
    linear.weight = nn.Parameter(torch.zeros(6, 4).t())


def whole_numbers(linear):
    linear.weight = nn.Parameter(torch.zeros(4, 6).int(), False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Embedding(4, 4), "it is a nn.Embedding, not an nn.Linear"),
        (lambda: Subclass(4, 4), "Subclass, whose own forward would be lost"),
        (lambda: LoRALinear(4, 4), "LoRALinear, whose own forward would be lost"),
        (lambda: SparseDeltaLinear(4, 4, num_deltas=1), "SparseDeltaLinear, whose own forward would be lost"),
        (lambda: S2FTLinear(4, 4, num_channels=1), "S2FTLinear, whose own forward would be lost"),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), "its weight is parametrized"),
        (lambda: changed(of_other_strides), r"its weight is not contiguous \(strides \[1, 4\]\)"),
        (lambda: changed(whole_numbers), "its weight is int32"),
        (lambda: changed(lambda linear: setattr(linear, "forward", abs)), "its forward is replaced on the instance"),
        (lambda: changed(lambda linear: linear._register_state_dict_hook(print)), "it has state_dict hooks"),
        (lambda: Conv1D(4, 6), "Conv1D, not an nn.Linear"),
    ],
)
def test_what_cannot_be_replaced_is_refused_with_the_reason(make, message):
    linear = make()
    before = [parameter.requires_grad for parameter in linear.parameters()]
    with pytest.raises(TypeError, match=message):
        S2FTLinear.from_linear(linear, num_channels=1)
    assert [parameter.requires_grad for parameter in linear.parameters()] == before


def conv1d_with(weight):
    layer = Conv1D(4, 6)
    layer.weight = nn.Parameter(weight, weight.is_floating_point())
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(4, 4), "it is a nn.Linear, not a Conv1D"),
        (lambda: nn.Conv1d(4, 4, 1), "it is a nn.Conv1d, not a Conv1D"),
        (lambda: ConvSubclass(4, 6), "ConvSubclass, whose own forward would be lost"),
        (lambda: random_s2ft_module("input of Conv1D")[0], "S2FTConv1D, whose own forward would be lost"),
        (lambda: conv1d_with(torch.zeros(4, 6)), "Conv1D, not a Conv1D"),
        (lambda: conv1d_with(torch.zeros(4, 6).t()), r"its weight is not contiguous \(strides \[1, 6\]\)"),
        (lambda: conv1d_with(torch.zeros(6, 4).int()), "its weight is int32"),
        (lambda: nn.utils.parametrizations.orthogonal(Conv1D(4, 4)), "Conv1D, not a Conv1D"),
    ],
)
def test_what_is_no_plain_conv1d_is_refused_with_the_reason(make, message):
    with pytest.raises(TypeError, match=f"S2FTConv1D cannot replace this layer: .*{message}"):
        S2FTConv1D.from_linear(make(), num_channels=1)
    with pytest.raises(TypeError, match="S2FTConv1D is made over a Conv1D that exists"):
        S2FTConv1D()


BAD_OPTIONS = [
    ({}, "give either ratio or num_channels, got ratio=None, num_channels=None"),
    ({"ratio": 0.1, "num_channels": 3}, "give either ratio or num_channels"),
    *(({"ratio": value}, r"ratio must be in \(0, 1\], got") for value in (0.0, -0.1, 1.1, float("nan"), "1", True)),
    *(
        ({"num_channels": value}, r"num_channels must be an integer in \[0, 6\], got")
        for value in (-1, 7, 2.0, "1", True)
    ),
    ({"num_channels": 5, "dim": "output"}, r"num_channels must be an integer in \[0, 4\], got 5"),
    ({"num_channels": 1, "dim": "rows"}, 'dim must be "input" or "output", got \'rows\''),
    ({"num_channels": 1, "dim": 1}, 'dim must be "input" or "output", got 1'),
    ({"num_channels": 1, "adapter_dtype": torch.int8}, "adapter_dtype must be float32, .*, got torch.int8"),
    (
        {"num_channels": 1, "adapter_dtype": torch.float64},
        "adapter_dtype must be .*got torch.float64 over a torch.float3",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_hyperparameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        S2FTLinear(6, 4, **options)
    for linear, kind in ((nn.Linear(6, 4), S2FTLinear), (plain_layer(True, 6, 4), S2FTConv1D)):
        with pytest.raises(ValueError, match=message):
            kind.from_linear(linear, **options)
        assert linear.weight.requires_grad


BAD_CHANNELS = [
    (channels(0, 3, 1), ValueError, "indices must be sorted, got 1 at position 2 after 3"),
    (channels(0, 3, 3), ValueError, "indices must be unique, got 3"),
    (channels(0, 1, 6), ValueError, r"indices must be in \[0, 6\), got 6"),
    (channels(-1, 2, 3), ValueError, r"indices must be in \[0, 6\), got -1"),
    (torch.arange(7), ValueError, "indices must be at most as many as there are channels, 6"),
    (torch.tensor([[1, 2, 3]]), ValueError, "indices must be 1-D"),
    (channels(0, 1, 2, dtype=torch.int32), TypeError, "indices must be int64, got int32"),
    (torch.arange(3.0), TypeError, "indices must be int64, got float32"),
    (torch.tensor([True, False, True]), TypeError, "indices must be int64, got bool"),
]


@KIND
@pytest.mark.parametrize(("indices", "error", "message"), BAD_CHANNELS)
def test_bad_channels_are_refused_and_nothing_changes(kind, indices, error, message):
    dim, transposed = parted(kind)
    linear = plain_layer(transposed, 6, 6)
    with pytest.raises(error, match=message):
        drop_in(transposed).from_linear(linear, indices, dim)
    assert linear.weight.requires_grad
    layer, original = random_s2ft_module(kind, in_features=6, out_features=6, num_channels=3)
    layer(torch.zeros(6))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=message):
        layer.set_slice(indices)
    with pytest.raises(RuntimeError, match="indices"):
        layer.load_state_dict({**layer.state_dict(), "indices": indices, "weight": torch.zeros(6, 6)})
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)


def test_channels_and_a_count_at_once_are_refused():
    for more in ({"num_channels": 1}, {"ratio": 0.5}):
        with pytest.raises(ValueError, match="give indices, ratio or num_channels, got more than one of them"):
            S2FTLinear.from_linear(nn.Linear(6, 4), channels(1), **more)


@KIND
def test_given_channels_train_and_no_other(kind):
    dim, transposed = parted(kind)
    linear = plain_layer(transposed, 6, 4)
    weight = linear.weight.detach().clone()
    layer = drop_in(transposed).from_linear(linear, channels(0, 3), dim)
    with torch.no_grad():
        layer.trainable.add_(1.0)
    layer(torch.zeros(6))
    axis = 1 if dim == "input" else 0
    expected = torch.zeros(4, 6).index_fill(axis, channels(0, 3), 1.0)
    torch.testing.assert_close(layer.oriented(layer.weight.detach() - weight), expected)
    torch.testing.assert_close(layer.change(), torch.ones_like(layer.trainable))


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
@DIM
def test_the_slice_is_float32_over_half_precision_unless_told_otherwise(dim, dtype, adapter_dtype, expected):
    layer = S2FTLinear(24, 20, num_channels=4, dim=dim, dtype=dtype, adapter_dtype=adapter_dtype)
    y = layer(torch.randn(3, 24, dtype=dtype))
    y.sum().backward()
    assert y.dtype == layer.original.dtype == dtype
    assert layer.trainable.dtype == layer.trainable.grad.dtype == layer.change().dtype == expected


@DIM
@pytest.mark.parametrize(("ratio", "count"), [(1e-9, 1), (0.25, 100), (1.0, 400)])
def test_one_seed_gives_one_choice_and_leaves_torch_alone(dim, ratio, count):
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return S2FTLinear.from_linear(linear, dim=dim, ratio=ratio, generator=generator).indices

    linear = nn.Linear(400, 400)
    state = torch.get_rng_state()
    first = drawn(5)
    assert first.numel() == count and (first[1:] > first[:-1]).all()
    assert torch.equal(drawn(5), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn(5), drawn(6)) == (ratio == 1.0)
    assert abs(first.double().mean() - 199.5) < 5 * 400 / (12 * count) ** 0.5, "drawn evenly"


@KIND
def test_all_channels_train_as_the_dense_layer_does(kind):
    dim, transposed = parted(kind)
    linear = plain_layer(transposed, 6, 4).double()
    dense = copy.deepcopy(linear)
    layer = drop_in(transposed).from_linear(linear, ratio=1.0, dim=dim)
    x = torch.randn(5, 6, dtype=torch.float64)
    ours, theirs = torch.optim.SGD([layer.trainable], lr=0.1), torch.optim.SGD([dense.weight], lr=0.1)
    for _ in range(5):
        for module, optimizer in ((layer, ours), (dense, theirs)):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    layer(x)
    torch.testing.assert_close(layer.weight, dense.weight)


@KIND
def test_a_layer_with_no_channels_is_the_frozen_one(kind):
    layer, _ = random_s2ft_module(kind, num_channels=0)
    x = torch.randn(3, 24, requires_grad=True)
    optimizer = SparseAdamW([layer.trainable])
    layer(x).sum().backward()
    optimizer.step()
    assert layer.oriented(layer.trainable.grad).shape == ((20, 0) if layer.dim == "input" else (0, 24))
    torch.testing.assert_close(x.grad, layer.oriented(layer.weight).sum(0).expand(3, 24))


@KIND
def test_gradients_accumulate_exactly_over_calls_and_backward_passes(kind):
    layer, _ = random_s2ft_module(kind, torch.float64)
    x, y = torch.randint(-3, 4, (2, 3, 24)).double()
    direction = torch.randint(-3, 4, (20,)).double()  # sums of small integers are exact
    (layer(torch.cat([x, y])) @ direction).sum().backward()
    together = layer.trainable.grad.clone()
    assert together.any()
    layer.zero_grad()
    (layer(x) @ direction).sum().backward()
    (layer(y) @ direction).sum().backward()
    assert_same_bits(layer.trainable.grad, together)
    layer.zero_grad()
    ((layer(x) @ direction).sum() + (layer(y) @ direction).sum()).backward()
    assert_same_bits(layer.trainable.grad, together)


@KIND
def test_a_frozen_slice_gets_no_gradient(kind):
    layer, _ = random_s2ft_module(kind)
    layer.trainable.requires_grad_(False)
    x = torch.randn(3, 24, requires_grad=True)
    layer(x).sum().backward()
    assert layer.trainable.grad is None and x.grad is not None


@KIND
def test_a_trained_bias_gets_its_gradient(kind):
    layer, _ = random_s2ft_module(kind)
    layer.bias.requires_grad_(True)
    layer(torch.randn(3, 24)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((20,), 3.0))


def test_columns_that_somebody_has_already_are_used_as_they_are():
    layer, _ = random_s2ft_module("input")
    x = torch.randn(3, 24)
    layer(x, x_slice=x[:, layer.indices]).sum().backward()
    expected = layer.trainable.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    assert_same_bits(layer.trainable.grad, expected)
    layer.merge()
    assert layer(x, x_slice=x[:, layer.indices]).shape == (3, 20)


@COPIES
@KIND
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_compute_the_same_and_share_nothing(kind, copied, written, merged):
    layer, original = random_s2ft_module(kind)
    x = torch.randn(3, 24)
    if written:
        layer(x)
    if merged:
        layer.merge()
    twin = copied(layer)
    expected = layer(x).detach()
    assert twin.merged == merged and twin.dim == layer.dim
    assert_same_bits(twin(x).detach(), expected)
    if merged:
        twin.unmerge()
    optimizer = SparseAdamW([twin.trainable], lr=0.1)
    twin(x).sum().backward()
    optimizer.step()
    assert_same_bits(twin.weight.detach(), weight_with_slice(twin, original))
    assert_same_bits(layer(x).detach(), expected)
    twin.restore_weight()
    assert_same_bits(twin.weight.detach(), original)


@KIND
def test_set_slice_moves_the_slice_and_restores_where_it_was(kind):
    layer, original = random_s2ft_module(kind)
    layer(torch.zeros(24))
    parameter, before = layer.trainable, layer.indices.clone()
    free = torch.ones(layer.channels, dtype=torch.bool).index_fill(0, layer.indices, False)
    elsewhere = free.nonzero().flatten()[:COUNT]
    trainable = torch.randn(layer.trainable.shape)
    layer.set_slice(elsewhere, trainable)
    assert layer.trainable is parameter and torch.equal(layer.indices, elsewhere)
    assert_same_bits(layer.trainable.detach(), trainable)
    layer(torch.zeros(24))
    assert_same_bits(layer.weight.detach(), weight_with_slice(layer, original))
    layer.set_slice(before)
    assert not layer.change().any()
    layer(torch.zeros(24))
    assert_same_bits(layer.weight.detach(), original)


def test_channels_and_slices_that_were_given_stay_the_caller_s():
    indices, moved, trainable = channels(0, 2, 5), channels(1, 2, 3), torch.ones(4, 3)
    layer = S2FTLinear.from_linear(nn.Linear(6, 4), indices)
    layer.set_slice(moved, trainable)
    layer.set_slice(channels(3, 4, 5), torch.zeros(4, 3))
    assert indices.tolist() == [0, 2, 5] and moved.tolist() == [1, 2, 3] and bool((trainable == 1).all())


@KIND
def test_set_slice_refuses_what_does_not_fit_and_changes_nothing(kind):
    layer, _ = random_s2ft_module(kind)
    layer(torch.zeros(24))
    before = copy.deepcopy(layer.state_dict())
    for arguments, message in (
        ((torch.arange(4),), r"indices must be \[5\], as before, got \[4\]"),
        ((torch.arange(5), torch.zeros(3, 5)), r"trainable must be \[.*\], got \[3, 5\]"),
        ((torch.arange(5), layer.trainable.detach().t()), r"trainable must be \[.*\], got"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.set_slice(*arguments)
    layer.merge()
    with pytest.raises(ValueError, match="the slice is merged; unmerge it before moving it"):
        layer.set_slice(torch.arange(5))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@KIND
def test_read_original_takes_a_weight_changed_by_hand(kind):
    layer, _ = random_s2ft_module(kind)
    layer.restore_weight()
    other = torch.randn(layer.weight.shape)
    with torch.no_grad():
        layer.weight.copy_(other)
    layer.read_original()
    layer(torch.zeros(24))
    assert_same_bits(layer.weight.detach(), weight_with_slice(layer, other))
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), other)


@DIM
def test_a_layer_made_on_the_meta_device_is_initialized_when_it_gets_memory(dim):
    layer = S2FTLinear(400, 300, num_channels=100, dim=dim, device="meta").to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="made on the meta device and is not filled yet; load a state_dict into it"):
        layer(torch.zeros(400))
    layer.reset_parameters()
    assert 0.045 < layer.weight.abs().max() <= 0.05 and not layer.change().any()
    assert (layer.indices[1:] > layer.indices[:-1]).all() and layer.indices[0] >= 0
    assert layer.indices[-1] < layer.channels
    layer(torch.zeros(400)).sum().backward()
    original = layer.weight.detach().clone()
    with torch.no_grad():
        layer.trainable.add_(1.0)
    layer(torch.zeros(400))
    assert not torch.equal(layer.weight, original)
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)


@DIM
def test_resetting_draws_everything_anew(dim):
    layer, _ = random_s2ft_module(dim, seed=1)
    layer(torch.zeros(24))
    before = layer.indices.clone()
    layer.reset_parameters()
    weight = layer.weight.detach().clone()
    assert not torch.equal(layer.indices, before) and not layer.change().any()
    assert_same_bits(layer.trainable.detach(), slice_of(layer, weight))
    layer(torch.zeros(24))
    assert_same_bits(layer.weight.detach(), weight)


@DIM
def test_repr_says_what_the_layer_is(dim):
    layer, _ = random_s2ft_module(dim)
    expected = f"S2FTLinear(in_features=24, out_features=20, bias=True, dim='{dim}', num_channels=5)"
    assert repr(layer) == expected
    layer.merge()
    assert repr(layer) == expected[:-1] + ", merged=True)"
    conv1d, _ = random_s2ft_module(f"{dim} of Conv1D")
    assert repr(conv1d) == f"S2FTConv1D(nf=20, nx=24, dim='{dim}', num_channels=5)"
