"""SHiRA and Super-Tuning layers that `accelerate` leaves alone, each with its reason; they compute as without it."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.integrations.tied import tied_weights

from .peft_models import (
    EACH_KIND,
    KINDS,
    config_of,
    layer_of,
    llama,
    peft,
    small,
    sparse,
    tokens,
    twins,
    values_of,
    weight_of,
)


def changed(change):
    """A maker of a small model with something done to its layer."""

    def make(kind):
        model = small(kind)
        change(layer_of(model))
        return model

    return make


def with_parametrized_base(layer):
    nn.utils.parametrizations.weight_norm(layer.base_layer)


def with_forward_replaced(layer):
    layer.forward = layer.forward


def with_base_forward_replaced(layer):
    layer.base_layer.forward = layer.base_layer.forward


def with_strided_weight(layer):
    layer.base_layer.weight.data = layer.base_layer.weight.data.t().contiguous().t()


def with_repeated_index(layer):
    if hasattr(layer, "shira_indices"):
        layer.shira_indices["default"][:, 1] = layer.shira_indices["default"][:, 0]
    else:
        layer.supertuning_indices["default"][1] = layer.supertuning_indices["default"][0]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_subclass(layer):
    layer.base_layer.__class__ = Doubled


LEFT_ALONE = {
    "parametrized": (changed(with_parametrized_base), "Parametrized|its weight is parametrized"),
    "replaced layer": (changed(with_forward_replaced), "its forward is replaced on the instance"),
    "replaced base": (changed(with_base_forward_replaced), "inside it, its forward is replaced on the instance"),
    "strided": (changed(with_strided_weight), r"its weight is not contiguous \(strides \[1, 7\]\)"),
    "trained": (changed(lambda layer: layer.base_layer.weight.requires_grad_()), "its base weight trains"),
    "repeated": (changed(with_repeated_index), "its indices must be unique"),
    "subclass": (changed(with_subclass), "its base layer is a .*Doubled, not an nn.Linear"),
}


@EACH_KIND
@pytest.mark.parametrize(("make", "message"), LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_what_cannot_be_fused_is_left_alone_with_the_reason(kind, make, message):
    model = make(kind)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = pk.accelerate(model)
    assert len(report.left_alone) == 1 and re.search(message, report.left_alone[0].reason), report.left_alone
    x = torch.randn(3, 11)
    y = model(x)
    pk.restore(model)
    assert torch.equal(y, model(x))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def shared(kind, other):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7))
    other(model)
    options = {"r": 1} if kind == "shira" else {"sparsity": 0.6}
    return peft.get_peft_model(model, config_of(kind, target_modules=["0"], **options))


def tie(model):
    model[1].weight = model[0].weight


def tie_by_module(model):
    model.append(model[0])


def tie_by_view(model):
    both = torch.randn(10, 7)
    model[0].weight, model[1].weight = nn.Parameter(both[:7]), nn.Parameter(both[3:])


def tie_to_buffer(model):
    model[1].register_buffer("copy", model[0].weight.detach())


@EACH_KIND
@pytest.mark.parametrize(
    ("other", "name"),
    [
        (tie, "base_model.model.1.weight"),
        (tie_by_module, "base_model.model.2.weight"),
        (tie_by_view, "base_model.model.1.weight"),
        (tie_to_buffer, "base_model.model.1.copy"),
    ],
)
def test_a_shared_weight_is_left_alone(kind, other, name):
    model = shared(kind, other)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(3, 7)
    expected = model(x)
    assert pk.accelerate(model).layers[0].reason == f"its base weight is tied to {name}"
    assert torch.equal(model(x), expected) and not isinstance(layer_of(model), sparse.SparseLayer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@EACH_KIND
def test_parts_of_one_tensor_that_do_not_overlap_are_not_shared(kind):
    def split(model):
        both = torch.randn(14, 7)
        model[0].weight, model[1].weight = nn.Parameter(both[:7]), nn.Parameter(both[7:])

    model = shared(kind, split)
    neighbour = model.base_model.model[1].weight.clone()
    x = torch.randn(3, 7)
    expected = model(x)
    assert pk.accelerate(model).fused
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(model.base_model.model[1].weight, neighbour)


@EACH_KIND
def test_a_weight_that_was_tied_since_is_restored(kind):
    model = shared(kind, lambda model: None)
    _, twin, _ = twins(model)
    x = torch.randn(3, 7)
    twin(x)
    twin.base_model.model[1].weight = weight_of(layer_of(twin))
    assert "is tied to" in pk.accelerate(twin).left_alone[0].reason
    assert not isinstance(layer_of(twin), sparse.SparseLayer)
    assert torch.equal(weight_of(layer_of(twin)), weight_of(layer_of(model)))


def test_a_layer_at_two_places_is_one():
    block = nn.Module()
    block.base_layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": block, "b": block})
    assert tied_weights(model)("a.base_layer.weight") == []
    model["c"] = block.base_layer
    assert tied_weights(model)("a.base_layer.weight") == ["c.weight"]


def test_a_tied_output_layer_of_a_language_model():
    config = config_of(KINDS[0], target_modules=["lm_head", "q_proj"])
    model = peft.get_peft_model(llama(tie_word_embeddings=True), config)
    model, twin, report = twins(model)
    assert len(report.fused) == 2
    assert [row.reason for row in report.left_alone] == [
        "its base weight is tied to base_model.model.model.embed_tokens.weight"
    ]
    torch.testing.assert_close(twin(tokens()).logits, model(tokens()).logits, rtol=1e-5, atol=1e-5)


@EACH_KIND
def test_arguments_and_inputs_that_are_peft_s(kind):
    model, twin, _ = twins(small(kind))
    x = torch.randn(3, 11)
    twin(x)
    for each in (model, twin):
        with pytest.raises(RuntimeError, match=r"dtype|same"):
            each(x.double())
    assert torch.equal(weight_of(layer_of(twin)), weight_of(layer_of(model)))
    with pytest.raises(RuntimeError, match=r"mat1|shape"):
        model(torch.randn(3, 5))
    with pytest.raises((RuntimeError, ValueError), match=r"mat1|shape|must be"):
        twin(torch.randn(3, 5))
    torch.testing.assert_close(twin(x), model(x))


@EACH_KIND
def test_another_peft_is_recognized(kind, monkeypatch):
    theirs = type(layer_of(small(kind)))
    sparse.check_peft.cache_clear()
    original = theirs.forward
    monkeypatch.setattr(theirs, "forward", lambda self, x, *args, **kwargs: 2 * original(self, x))
    with pytest.raises(pk.integrations.peft.PeftIncompatible, match="does not compute what it has computed so far"):
        pk.accelerate(small(kind))
    monkeypatch.setattr(theirs, "forward", lambda self, hidden: hidden)
    with pytest.raises(pk.integrations.peft.PeftIncompatible, match="is expected to take"):
        pk.accelerate(small(kind))


@EACH_KIND
def test_data_parallel_copies_of_a_written_weight_are_refused(kind):
    model, twin, _ = twins(small(kind))
    x = torch.randn(3, 11)
    twin(x)
    layer = layer_of(twin)
    replica = layer._replicate_for_data_parallel()
    base = copy.deepcopy(layer._modules["base_layer"])  # as broadcast: the bits that are in it
    replica._modules["base_layer"] = base
    with pytest.raises(RuntimeError, match=r"call restore\(model\) before DataParallel"):
        replica(x)
    layer.base_layer  # noqa: B018  restored by being asked for
    replica._modules["base_layer"] = copy.deepcopy(layer._modules["base_layer"])
    torch.testing.assert_close(replica(x), model(x))
    assert values_of(layer) is not None
