"""Deltas in a live model: added, switched and taken away without a trace; refused before anything is changed."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from peft_kernels import deltas

from ..support.accuracy import assert_same_bits
from ..support.places import dtype_name
from .dense import DTYPES, everywhere, packed, random_dense

SHAPES = {"0.weight": (30, 17), "0.bias": (30,), "1.weight": (5, 30)}


def small_model(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(17, 30), nn.Linear(30, 5, bias=False)).to(dtype)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model, expected):
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, expected[name], name)


def some(seed, density=0.4, dtype=torch.float32):
    return random_dense(seed, density, dtype, SHAPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("values_dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("weight", [1.0, -0.37])
def test_added_once_rounded_and_restored_exactly(dtype, values_dtype, weight):
    model, tensors = small_model(dtype), some(1, dtype=values_dtype)
    before = state(model)
    for delta in (packed(tensors), everywhere(tensors)):
        applied = deltas.apply(model, delta, weight=weight)
        wide = torch.promote_types(torch.promote_types(dtype, values_dtype), torch.float32)
        for name, tensor in tensors.items():
            scaled = tensor.to(torch.promote_types(values_dtype, torch.float32)) * weight
            assert_same_bits(model.state_dict()[name], (before[name].to(wide) + scaled.to(wide)).to(dtype), name)
        applied.remove()
        assert not applied.active
        assert_state(model, before)


def test_switch_leads_to_the_same_bits_as_applying():
    model = small_model()
    before = state(model)
    with deltas.apply(model, packed(some(2), torch.bfloat16)):
        second = state(model)
    with deltas.apply(model, packed(some(1))) as applied:
        for _ in range(3):
            applied.switch(packed(some(2)))
            assert_state(model, second)
            applied.switch(packed({"0.bias": torch.ones(30)}), weight=2.0)
    assert_state(model, before)


def test_training_in_between_does_not_matter():
    model, delta = small_model(), packed(some(1, density=1.0))
    before = state(model)
    with deltas.apply(model, delta), torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    assert_state(model, before)


def test_deltas_come_off_in_the_opposite_order():
    model = small_model()
    before = state(model)
    first = deltas.apply(model, packed(some(1)))
    between = state(model)
    second = deltas.apply(model, packed(some(2)))
    for call in (first.remove, lambda: first.switch(packed(some(3)))):
        with pytest.raises(ValueError, match="another delta was applied after this one"):
            call()
    second.remove()
    assert_state(model, between)
    first.remove()
    assert_state(model, before)
    for call in (first.remove, lambda: first.switch(packed(some(3)))):
        with pytest.raises(ValueError, match="was removed from the model before"):
            call()


def test_parameters_stay_the_same_objects():
    model = small_model()
    parameters = list(model.parameters())
    versions = [parameter._version for parameter in parameters]
    with deltas.apply(model, packed(some(1))):
        assert all(left is right for left, right in zip(parameters, model.parameters(), strict=True))
        assert all(parameter.requires_grad and parameter.grad is None for parameter in parameters)
        assert all(parameter._version > version for parameter, version in zip(parameters, versions, strict=True))


def test_buffers_can_be_changed():
    model = nn.BatchNorm1d(6)
    with deltas.apply(model, packed({"running_mean": torch.ones(6)})):
        assert_same_bits(model.running_mean, torch.ones(6))
    assert_same_bits(model.running_mean, torch.zeros(6))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight


def test_a_tied_tensor_goes_by_either_name_but_not_by_both():
    model = Tied()
    before = model.head.weight.detach().clone()
    for name in ("embedding.weight", "head.weight"):
        with deltas.apply(model, packed({name: torch.ones(9, 4)})):
            assert_same_bits(model.embedding.weight.detach(), before + 1)
    both = packed({"embedding.weight": torch.ones(9, 4), "head.weight": torch.ones(9, 4)})
    with pytest.raises(ValueError, match=r"embedding\.weight and head\.weight are one tensor"):
        deltas.apply(model, both)
    assert_same_bits(model.head.weight.detach(), before)


def broken(name):
    raise ValueError("the file is damaged")


def unreadable():
    """A delta whose second entry cannot be read."""
    good = packed(some(1))
    return deltas.ComputedDelta(good.specs, lambda name: good[name] if name == "0.bias" else broken(name), None, ())


BAD = {
    "the delta changes 2.weight, which the model does not have": lambda: packed({"2.weight": torch.ones(3)}),
    r"1.weight must be \[30, 5\] for this delta, got \[5, 30\]": lambda: packed({"1.weight": torch.ones(30, 5)}),
    "the file is damaged": unreadable,
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_changes_nothing(message):
    model = small_model()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        deltas.apply(model, BAD[message]())
    assert_state(model, before)
    with deltas.apply(model, packed(some(1))) as applied:
        inside = state(model)
        with pytest.raises(ValueError, match=message):
            applied.switch(BAD[message]())
        assert_state(model, inside)
    assert_state(model, before)


def test_tensors_that_cannot_be_written():
    model = nn.Linear(4, 3, bias=False)
    delta = packed({"weight": torch.ones(3, 4)})
    with pytest.raises(ValueError, match="weights must be finite"):
        deltas.apply(model, delta, weight=float("nan"))
    with pytest.raises(ValueError, match="weight must be a plain tensor on the CPU or a GPU"):
        deltas.apply(nn.Linear(4, 3, bias=False, device="meta"), delta)
    model.weight.data = torch.ones(4, 3).t()
    with pytest.raises(ValueError, match="weight must be contiguous"):
        deltas.apply(model, delta)
    quantised = nn.Module()
    quantised.register_buffer("weight", torch.ones(3, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="weight must be floating point"):
        deltas.apply(quantised, delta)


def test_a_handle_does_not_keep_its_model():
    model = small_model()
    applied = deltas.apply(model, packed(some(1)))
    del model
    gc.collect()
    with pytest.raises(ValueError, match="no longer exists"):
        applied.remove()
