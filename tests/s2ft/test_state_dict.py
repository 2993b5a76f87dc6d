"""`state_dict` of an S2FT layer: whole round trips, plain layers both ways, and bad ones refused."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from peft_kernels.nn import S2FTLinear
from peft_kernels.optim import SparseAdamW

from ..support.accuracy import assert_same_bits
from ..support.s2ft_layer import KINDS, parted
from ..support.s2ft_module import (
    COUNT,
    drop_in,
    plain_layer,
    random_s2ft_module,
    slice_of,
    weight_with_slice,
)

KIND = pytest.mark.parametrize("kind", KINDS)


def assert_equal_layers(layer, other, original):
    """Same function, same weight without the slice, and both still follow their optimizers."""
    x = torch.randn(3, 24)
    assert_same_bits(layer(x).detach(), other(x).detach())
    assert torch.equal(layer.indices, other.indices)
    if not layer.merged:
        layer(x).sum().backward()
        SparseAdamW([layer.trainable], lr=0.1).step()
        layer(x)
        assert_same_bits(layer.weight.detach(), weight_with_slice(layer, original))
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)


def new_layer(kind, device):
    """Nothing has been trained in it, and on the meta device it has no numbers either."""
    dim, transposed = parted(kind)
    return drop_in(transposed).from_linear(plain_layer(transposed).to(device), num_channels=COUNT, dim=dim)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@KIND
@pytest.mark.parametrize("saved", ["written", "not_written", "restored", "merged"])
@pytest.mark.parametrize("into", ["new", "trained", "merged", "meta", "assigned"])
def test_round_trip(kind, saved, into):
    layer, original = random_s2ft_module(kind, seed=1)
    if saved != "not_written":
        layer(torch.zeros(24))
    if saved == "restored":
        layer.restore_weight()
    if saved == "merged":
        layer.merge()
    state = through_a_file(layer.state_dict())
    if saved == "merged":
        layer.unmerge()
    other = new_layer(kind, "meta" if into == "meta" else "cpu")
    if into == "meta":
        other.to_empty(device="cpu")
    if into == "trained":
        other, _ = random_s2ft_module(kind, seed=2)
        other(torch.zeros(24))
    if into == "merged":
        other.merge()
    other.load_state_dict(state, assign=into == "assigned")
    assert other.merged == (into == "merged")
    assert_equal_layers(other, layer, original)


@KIND
def test_a_meta_layer_may_take_the_tensors_themselves(kind):
    layer, original = random_s2ft_module(kind, seed=1)
    other = new_layer(kind, "meta")
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    assert_equal_layers(other, layer, original)


def test_an_empty_layer_is_not_filled_by_a_part():
    layer, _ = random_s2ft_module()
    for name in ("trainable", "indices", "weight", "original"):
        other = S2FTLinear(24, 20, num_channels=COUNT, device="meta").to_empty(device="cpu")
        state = {key: value for key, value in layer.state_dict().items() if key != name}
        if name in ("indices", "original"):
            with pytest.raises(RuntimeError, match=r"indices: expected (with )?original"):
                other.load_state_dict(state, strict=False)
        else:
            other.load_state_dict(state, strict=False)
        with pytest.raises(RuntimeError, match="not filled yet"):
            other(torch.zeros(24))


@KIND
@pytest.mark.parametrize("merged", [False, True])
def test_loading_the_plain_layer_takes_the_slice_of_its_weight(kind, merged):
    layer, _ = random_s2ft_module(kind)
    layer(torch.zeros(24))
    if merged:
        layer.merge()
    indices, linear = layer.indices.clone(), plain_layer(layer.transposed)
    result = layer.load_state_dict(linear.state_dict(), strict=False)
    assert sorted(result.missing_keys) == ["indices", "original", "trainable"]
    assert torch.equal(layer.indices, indices) and not layer.change().any()
    original = linear.weight.detach()
    assert_same_bits(layer.trainable.detach(), slice_of(layer, original))
    assert_same_bits(layer(torch.eye(24)).detach(), linear(torch.eye(24)).detach())
    assert_same_bits(layer.weight.detach(), original)


@KIND
@pytest.mark.parametrize("restored", [False, True])
def test_the_plain_layer_loads_ours(kind, restored):
    layer, original = random_s2ft_module(kind)
    x = torch.randn(3, 24)
    expected = layer(x).detach()
    if restored:
        layer.restore_weight()
    linear = plain_layer(layer.transposed)
    result = linear.load_state_dict(layer.state_dict(), strict=False)
    assert sorted(result.unexpected_keys) == ["indices", "original", "trainable"]
    assert_same_bits(linear.weight.detach(), original if restored else weight_with_slice(layer, original))
    if not restored:
        assert_same_bits(linear(x).detach(), expected)


@KIND
@pytest.mark.parametrize("assign", [False, True])
def test_other_channels_move_the_slice(kind, assign):
    layer, _ = random_s2ft_module(kind, seed=1)
    other, original = random_s2ft_module(kind, seed=2)
    assert not torch.equal(layer.indices, other.indices)
    layer(torch.zeros(24))
    layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert_equal_layers(layer, other, original)


@KIND
@pytest.mark.parametrize("names", [("trainable",), ("trainable", "indices")], ids="+".join)
def test_an_adapter_s_part_leaves_the_weight_beside_it_alone(kind, names):
    layer, original = random_s2ft_module(kind, seed=1)
    other, _ = random_s2ft_module(kind, seed=2)
    layer(torch.zeros(24))
    layer.load_state_dict({name: value for name, value in other.state_dict().items() if name in names}, strict=False)
    assert_same_bits(layer.trainable.detach(), other.trainable.detach())
    layer(torch.zeros(24))
    assert_same_bits(layer.weight.detach(), weight_with_slice(layer, original))
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)


@KIND
def test_another_dtype_of_the_file_is_converted_as_by_torch(kind):
    layer, original = random_s2ft_module(kind)
    other, _ = random_s2ft_module(kind, torch.bfloat16, seed=2)
    other.load_state_dict(layer.state_dict())
    other.restore_weight()
    assert_same_bits(other.weight.detach(), original.bfloat16())


BAD_STATES = {
    "unsorted": ({"indices": torch.arange(5).flip(0)}, "indices must be sorted"),
    "twice": ({"indices": torch.zeros(5, dtype=torch.int64)}, "indices must be unique"),
    "out_of_range": ({"indices": torch.arange(20, 25)}, r"indices must be in \[0, 24\), got 24"),
    "of_floats": ({"indices": torch.arange(5.0)}, "indices must be int64, got float32"),
    "short": ({"indices": torch.arange(5, dtype=torch.int32)}, "indices must be int64, got int32"),
    "too_few_channels": ({"indices": torch.arange(4)}, r"indices must be \[5\], .*got \[4\]"),
    "too_large_slice": ({"trainable": torch.zeros(20, 6)}, r"trainable must be \[20, 5\], .*got \[20, 6\]"),
    "other_dim": ({"trainable": torch.zeros(5, 24)}, r"trainable must be \[20, 5\], .*got \[5, 24\]"),
    "flat_originals": ({"original": torch.zeros(100)}, r"original must be \[20, 5\], .*got \[100\]"),
    "larger_weight": ({"weight": torch.zeros(21, 24)}, r"weight must be \[20, 24\], .*got \[21, 24\]"),
    "original_alone": ({"indices": None}, "expected with original"),
    "no_original": ({"original": None}, "expected original with them"),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_states_are_refused_and_nothing_changes(case, strict):
    changes, message = BAD_STATES[case]
    layer, original = random_s2ft_module(seed=1)
    expected = layer(torch.eye(24)).detach()
    before = copy.deepcopy(layer.state_dict())
    state = {**random_s2ft_module(seed=2)[0].state_dict(), **changes}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict({name: value for name, value in state.items() if value is not None}, strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert_same_bits(layer(torch.eye(24)).detach(), expected)
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)


@KIND
@pytest.mark.parametrize("swap", [False, True])
def test_torch_may_swap_the_parameters(kind, swap):
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        layer, original = random_s2ft_module(kind, seed=1)
        layer(torch.zeros(24))
        layer.double()
        other, _ = random_s2ft_module(kind, torch.float64, seed=2)
        other(torch.zeros(24, dtype=torch.float64))
        other.load_state_dict(copy.deepcopy(layer.state_dict()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    x = torch.ones(24, dtype=torch.float64)
    assert_same_bits(other(x).detach(), layer(x).detach())
    other(x).sum().backward()
    SparseAdamW([other.trainable], lr=0.1).step()
    assert_same_bits(other.weight.detach(), weight_with_slice(other, original.double()))


def test_a_bad_layer_inside_a_model_is_named():
    model = nn.Sequential(nn.Linear(2, 2), random_s2ft_module()[0])
    state = {**model.state_dict(), "1.indices": torch.zeros(5, dtype=torch.int64)}
    with pytest.raises(RuntimeError, match=r"1\.indices: indices must be unique"):
        model.load_state_dict(state)


def test_a_plain_layer_gets_what_was_trained_last():
    layer = random_s2ft_module("input")[0]
    for change in (
        lambda: layer.trainable.add_(1),
        lambda: layer.to("cpu"),
        lambda: layer.double(),
    ):
        with torch.no_grad():
            change()
        linear = nn.Linear(24, 20, dtype=layer.weight.dtype)
        linear.load_state_dict(layer.state_dict(), strict=False)
        assert_same_bits(linear.weight.detach()[:, layer.indices], layer.trainable.detach().to(layer.weight.dtype))


def test_channels_that_have_moved_otherwise_are_refused():
    first, second = random_s2ft_module("input")[0], random_s2ft_module("input")[0]
    first.order, second.order = torch.arange(24).flip(0), torch.arange(24).roll(1)
    before = second.trainable.detach().clone()
    with pytest.raises(RuntimeError, match=r"have moved \(co_permute\) to other places"):
        second.load_state_dict({**first.state_dict(), "trainable": before + 1})
    second.order = None
    with pytest.raises(RuntimeError, match="only the saved layer's channels have moved"):
        second.load_state_dict(first.state_dict(), strict=False)
    assert_same_bits(second.trainable.detach(), before)
    second.order = first.order.clone()
    second.load_state_dict({**first.state_dict(), "trainable": before + 1})
    assert_same_bits(second.trainable.detach(), before + 1)
