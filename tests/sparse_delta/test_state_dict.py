"""`state_dict` of a sparse-delta layer: whole round trips, plain layers both ways, and bad ones refused."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from peft_kernels.nn import SparseDeltaLinear
from peft_kernels.optim import SparseAdamW

from ..support.accuracy import assert_same_bits
from ..support.sparse_layer import random_module, weight_with


def assert_equal_layers(layer, other, original):
    """Same function, same weight without the delta, and both still follow their optimizers."""
    x = torch.randn(3, 24)
    assert_same_bits(layer(x).detach(), other(x).detach())
    assert torch.equal(layer.indices, other.indices)
    if not layer.merged:
        layer(x).sum().backward()
        SparseAdamW([layer.values], lr=0.1).step()
        layer(x)
        assert_same_bits(layer.weight.detach(), weight_with(layer, original))
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("saved", ["written", "not_written", "restored", "merged"])
@pytest.mark.parametrize("into", ["new", "trained", "merged", "meta", "assigned"])
def test_round_trip(saved, into):
    layer, original = random_module(seed=1)
    if saved != "not_written":
        layer(torch.zeros(24))
    if saved == "restored":
        layer.restore_weight()
    if saved == "merged":
        layer.merge()
    state = through_a_file(layer.state_dict())
    if saved == "merged":
        layer.unmerge()
    options = {"num_deltas": 37, "device": "meta" if into == "meta" else None}
    other = SparseDeltaLinear(24, 20, **options)
    if into == "meta":
        other.to_empty(device="cpu")
    if into == "trained":
        other, _ = random_module(seed=2)
        other(torch.zeros(24))
    if into == "merged":
        other.merge()
    other.load_state_dict(state, assign=into == "assigned")
    assert other.merged == (into == "merged")
    assert_equal_layers(other, layer, original)


def test_a_meta_layer_may_take_the_tensors_themselves():
    layer, original = random_module(seed=1)
    other = SparseDeltaLinear(24, 20, num_deltas=37, device="meta")
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    assert_equal_layers(other, layer, original)


def test_an_empty_layer_is_not_filled_by_a_part():
    layer, _ = random_module()
    for name in ("values", "indices", "weight", "original"):
        other = SparseDeltaLinear(24, 20, num_deltas=37, device="meta").to_empty(device="cpu")
        state = {key: value for key, value in layer.state_dict().items() if key != name}
        if name in ("indices", "original"):
            with pytest.raises(RuntimeError, match=r"indices: expected (with )?original"):
                other.load_state_dict(state, strict=False)
        else:
            other.load_state_dict(state, strict=False)
        with pytest.raises(RuntimeError, match="not filled yet"):
            other(torch.zeros(24))


def test_loading_the_plain_layer_keeps_the_delta_over_its_weight():
    layer, _ = random_module()
    layer(torch.zeros(24))
    values, linear = layer.values.detach().clone(), nn.Linear(24, 20)
    result = layer.load_state_dict(linear.state_dict(), strict=False)
    assert sorted(result.missing_keys) == ["indices", "original", "values"]
    assert_same_bits(layer.values.detach(), values)
    layer(torch.zeros(24))
    original = linear.weight.detach()
    assert_same_bits(layer.weight.detach(), weight_with(layer, original))
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)


@pytest.mark.parametrize("restored", [False, True])
def test_the_plain_layer_loads_ours(restored):
    layer, original = random_module()
    x = torch.randn(3, 24)
    expected = layer(x).detach()
    if restored:
        layer.restore_weight()
    linear = nn.Linear(24, 20)
    result = linear.load_state_dict(layer.state_dict(), strict=False)
    assert sorted(result.unexpected_keys) == ["indices", "original", "values"]
    assert_same_bits(linear.weight.detach(), original if restored else weight_with(layer, original))
    if not restored:
        assert_same_bits(linear(x).detach(), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_other_positions_move_the_delta(assign):
    layer, _ = random_module(seed=1)
    other, original = random_module(seed=2)
    assert not torch.equal(layer.indices, other.indices)
    layer(torch.zeros(24))
    layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert_equal_layers(layer, other, original)


def test_an_adapter_s_part_leaves_the_weight_beside_it_alone():
    # values, indices and bias without weight and original: the delta moves over the weight that is there.
    layer, original = random_module(seed=1)
    other, _ = random_module(seed=2)
    layer(torch.zeros(24))
    state = {name: value for name, value in other.state_dict().items() if name in ("values", "indices")}
    layer.load_state_dict(state, strict=False)
    layer(torch.zeros(24))
    assert_same_bits(layer.weight.detach(), weight_with(layer, original))
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)


def test_another_dtype_of_the_file_is_converted_as_by_torch():
    layer, original = random_module()
    other, _ = random_module(dtype=torch.bfloat16, seed=2)
    other.load_state_dict(layer.state_dict())
    other.restore_weight()
    assert_same_bits(other.weight.detach(), original.bfloat16())


BAD_STATES = {
    "unsorted": ({"indices": torch.arange(37).flip(0)}, "indices must be sorted"),
    "twice": ({"indices": torch.zeros(37, dtype=torch.int32)}, "indices must be unique"),
    "out_of_range": ({"indices": torch.arange(480 - 36, 481)}, r"indices must be in \[0, 480\), got 480"),
    "of_floats": ({"indices": torch.arange(37.0)}, "indices must be int32 or int64, got float32"),
    "too_few_positions": ({"indices": torch.arange(36)}, r"indices must be \[37\], .*got \[36\]"),
    "too_many_values": ({"values": torch.zeros(38)}, r"values must be \[37\], .*got \[38\]"),
    "matrix_of_originals": ({"original": torch.zeros(1, 37)}, r"original must be \[37\], .*got \[1, 37\]"),
    "larger_weight": ({"weight": torch.zeros(21, 24)}, r"weight must be \[20, 24\], .*got \[21, 24\]"),
    "original_alone": ({"indices": None}, "expected with original"),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_states_are_refused_and_nothing_changes(case, strict):
    changes, message = BAD_STATES[case]
    layer, original = random_module(seed=1)
    expected = layer(torch.eye(24)).detach()
    before = copy.deepcopy(layer.state_dict())
    state = {**random_module(seed=2)[0].state_dict(), **changes}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict({name: value for name, value in state.items() if value is not None}, strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert_same_bits(layer(torch.eye(24)).detach(), expected)
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)


@pytest.mark.parametrize("swap", [False, True])
def test_torch_may_swap_the_parameters(swap):
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        layer, original = random_module(seed=1)
        layer(torch.zeros(24))
        layer.double()
        other, _ = random_module(seed=2, dtype=torch.float64)
        other(torch.zeros(24, dtype=torch.float64))
        other.load_state_dict(copy.deepcopy(layer.state_dict()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    x = torch.ones(24, dtype=torch.float64)
    assert_same_bits(other(x).detach(), layer(x).detach())
    other(x).sum().backward()
    SparseAdamW([other.values], lr=0.1).step()
    assert_same_bits(other.weight.detach(), weight_with(other, original.double()))


def test_a_bad_layer_inside_a_model_is_named():
    model = nn.Sequential(nn.Linear(2, 2), random_module()[0])
    state = {**model.state_dict(), "1.indices": torch.zeros(37, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match=r"1\.indices: indices must be unique"):
        model.load_state_dict(state)
