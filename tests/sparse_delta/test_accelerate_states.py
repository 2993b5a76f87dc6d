"""Accelerated SHiRA and Super-Tuning layers through every change of state: PEFT's function, the base weight's bits."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.integrations.peft_sparse_delta import present_delta

from .peft_models import (
    EACH_KIND,
    adapted,
    assert_same_state,
    config_of,
    holds_delta,
    layer_of,
    small,
    sparse,
    tokens,
    twins,
    values_of,
    weight_of,
)


def ready(kind, dtype=torch.float32, adapters=1, **options):
    """A model, its accelerated twin with the delta in its weight, and an input."""
    model = small(kind, dtype, **options)
    if adapters == 2:
        other = {"r": 2} if kind == "shira" else {"sparsity": 0.7}
        model.add_adapter("second", config_of(kind, target_modules=["0"], **other))
    model, twin, _ = twins(model)
    x = torch.randn(5, 11, dtype=dtype)
    twin(x)
    assert holds_delta(layer_of(twin))
    assert not torch.equal(weight_of(layer_of(twin)), weight_of(layer_of(model)))
    return model, twin, x


def same_bits(model, twin):
    return torch.equal(weight_of(layer_of(twin)), weight_of(layer_of(model)))


def close(model, twin, x):
    torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)


def gradients(each, x):
    """Of every parameter that gets one, and of x."""
    each.zero_grad()
    x = x.clone().requires_grad_()
    each(x).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in each.parameters() if p.grad is not None)]


SEES = {
    "base_layer": lambda model: layer_of(model).base_layer.weight,
    "get_base_layer": lambda model: layer_of(model).get_base_layer().weight,
    "get_base_weight": lambda model: layer_of(model).get_base_weight(),
    "weight": lambda model: layer_of(model).weight,
    "state_dict": lambda model: model.state_dict()["base_model.model.0.base_layer.weight"],
    "get_submodule": lambda model: model.get_submodule("base_model.model.0.base_layer").weight,
    "get_parameter": lambda model: model.get_parameter("base_model.model.0.base_layer.weight"),
    "unload": lambda model: model.unload()[0].weight,
    "deepcopy": lambda model: weight_of(layer_of(copy.deepcopy(model))),
    "pickle": lambda model: weight_of(layer_of(pickle.loads(pickle.dumps(model)))),
}


@EACH_KIND
@pytest.mark.parametrize("way", SEES.values(), ids=SEES.keys())
def test_whoever_asks_for_the_weight_gets_the_original_bits(kind, way):
    model, twin, _ = ready(kind, torch.bfloat16)
    expected = weight_of(layer_of(model)).clone()
    assert torch.equal(way(twin), expected) and torch.equal(way(model), expected)


@EACH_KIND
def test_torch_save_holds_the_original_bits(kind):
    model, twin, x = ready(kind)
    expected, buffer = twin(x), io.BytesIO()
    torch.save(twin, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert same_bits(model, loaded) and torch.equal(loaded(x), expected)


@EACH_KIND
def test_delta_weights_and_queries_are_peft_s(kind):
    model, twin, x = ready(kind)
    ours, theirs = (layer_of(each).get_delta_weight("default") for each in (twin, model))
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert model.get_nb_trainable_parameters() == twin.get_nb_trainable_parameters()
    close(model, twin, x)


@EACH_KIND
def test_disabling_and_enabling_adapters(kind):
    model, twin, x = ready(kind)
    with model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(twin(x), model(x)) and same_bits(model, twin)
        assert pk.accelerate(twin).left_alone[0].reason == "its adapters are disabled"
    close(model, twin, x)
    assert holds_delta(layer_of(twin)) and pk.accelerate(twin).fused


@EACH_KIND
def test_a_forward_without_adapters_between_forward_and_backward(kind):
    # Preference training: the reference model is the same one with its adapters off.
    model, twin, x = ready(kind)
    found = []
    for each in (model, twin):
        inputs = x.clone().requires_grad_()
        policy = each(inputs)
        with torch.no_grad(), each.disable_adapter():
            reference = each(x)
        ((policy - reference) ** 2).sum().backward()
        found.append([inputs.grad, *(p.grad for p in each.parameters() if p.grad is not None)])
    assert len(found[0]) == (4 if kind == "supra" else 2)
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@EACH_KIND
@pytest.mark.parametrize("first", ["on", "off"])
def test_gradients_through_both_states_in_one_backward(kind, first):
    model, twin, x = ready(kind)
    found = []
    for each in (model, twin):
        inputs = x.clone().requires_grad_()
        outputs = []
        for state in ("on", "off") if first == "on" else ("off", "on"):
            if state == "off":
                with each.disable_adapter():
                    outputs.append(each(inputs))
            else:
                outputs.append(each(inputs))
        (outputs[0] * outputs[1]).sum().backward()
        found.append([inputs.grad, *(p.grad for p in each.parameters() if p.grad is not None)])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@EACH_KIND
def test_two_adapters_in_one_backward(kind):
    model, twin, x = ready(kind, adapters=2)
    found = []
    for each in (model, twin):
        inputs, outputs = x.clone().requires_grad_(), []
        for name in ("default", "second"):
            each.set_adapter(name)
            outputs.append(each(inputs))
        for name in ("default", "second"):
            layer_of(each).set_requires_grad(name)
        (outputs[0] * outputs[1]).sum().backward()
        found.append([inputs.grad, values_of(layer_of(each), "second").grad])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@EACH_KIND
def test_switching_adding_and_deleting_adapters(kind):
    model, twin, x = ready(kind, adapters=2)
    for name in ("second", "default", "second"):
        for each in (model, twin):
            each.set_adapter(name)
        close(model, twin, x)
        torch.testing.assert_close(gradients(twin, x), gradients(model, x), rtol=1e-4, atol=1e-4)
    for each in (model, twin):
        torch.manual_seed(4)
        each.add_adapter("third", config_of(kind, target_modules=["0"], **({"r": 1} if kind == "shira" else {})))
    close(model, twin, x)
    assert_same_state(model, twin)
    if kind != "shira":  # chosen by the largest entries of the weight, which must be the original ones
        found = [layer_of(each).supertuning_indices["third"] for each in (model, twin)]
        assert torch.equal(*found)
    for each in (model, twin):
        each.set_adapter("third")
    close(model, twin, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in (model, twin):
            each.delete_adapter("third")
    close(model, twin, x)
    assert_same_state(model, twin)


@EACH_KIND
def test_several_active_adapters_go_through_peft(kind):
    model, twin, x = ready(kind, adapters=2)
    for each in (model, twin):
        each.base_model.set_adapter(["default", "second"])
    assert pk.accelerate(twin).left_alone[0].reason == "2 adapters are active, not one"
    assert torch.equal(twin(x), model(x)) and same_bits(model, twin)
    for each in (model, twin):
        each.set_adapter("default")
    close(model, twin, x)
    assert holds_delta(layer_of(twin))


@EACH_KIND
@pytest.mark.parametrize("safe", [False, True])
def test_merging_and_unmerging_are_peft_s(kind, safe):
    model, twin, x = ready(kind, torch.bfloat16)
    for each in (model, twin):
        each.merge_adapter(safe_merge=safe)
    assert same_bits(model, twin) and torch.equal(twin(x), model(x))
    assert pk.accelerate(twin).left_alone[0].reason == "an adapter is merged into its weight"
    for each in (model, twin):
        each.unmerge_adapter()
    assert same_bits(model, twin)
    twin(x)
    assert holds_delta(layer_of(twin))
    assert_same_state(model, twin)
    plain = [each.merge_and_unload(safe_merge=safe) for each in (model, twin)]
    assert torch.equal(*(each[0].weight for each in plain)) and type(plain[1][0]) is nn.Linear


@EACH_KIND
def test_a_backward_that_can_no_longer_be_right_is_refused(kind):
    def output():
        _, twin, x = ready(kind)
        return twin, twin(x.requires_grad_()).sum()

    for change in (
        lambda twin: twin.merge_adapter(),
        pk.restore,
        lambda twin: twin.double(),
    ):
        twin, y = output()
        change(twin)
        with pytest.raises(RuntimeError, match="backward needs the base weight as it was in forward"):
            y.backward()
        assert not isinstance(layer_of(twin), sparse.SparseLayer) or not holds_delta(layer_of(twin))
    twin, y = output()
    with torch.no_grad():
        values_of(layer_of(twin)).mul_(2.0)
    with pytest.raises(RuntimeError, match=r"modified in place|modified by an inplace"):
        y.backward()
    twin, y = output()
    plain = twin.unload()
    before = plain[0].weight.clone()
    del twin
    gc.collect()
    with pytest.raises(RuntimeError, match="backward needs the base weight as it was in forward"):
        y.backward()
    assert torch.equal(plain[0].weight, before)


@EACH_KIND
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_accelerated_and_are_their_own(kind, copied):
    model, twin, x = ready(kind)
    other = copied(twin)
    assert type(layer_of(other)) is type(layer_of(twin)) and pk.accelerate(other).fused
    with torch.no_grad():
        values_of(layer_of(other)).mul_(3.0)
    other(x)
    close(model, twin, x)
    assert_same_state(model, twin)
    with torch.no_grad():
        values_of(layer_of(model)).mul_(3.0)
    close(model, other, x)
    assert pk.restore(other) == 1
    assert_same_state(model, other)


@EACH_KIND
def test_changing_dtype_rounds_the_original_weight(kind):
    model, twin, x = ready(kind)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        for each in (model, twin):
            each.to(dtype)
        assert_same_state(model, twin)
        assert pk.accelerate(twin).fused
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(twin(x.to(dtype)), model(x.to(dtype)), rtol=tolerance, atol=tolerance)
        assert holds_delta(layer_of(twin))


@EACH_KIND
@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_dict(kind, assign):
    model, twin, x = ready(kind)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.7)
    for each in (model, twin):
        each.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    close(model, twin, x)
    if assign:
        assert not holds_delta(layer_of(twin))
        reason = present_delta(layer_of(twin))
        assert reason == "its weight is not the one that accelerate saw; call accelerate again"
        assert pk.accelerate(twin).fused
        close(model, twin, x)
    assert holds_delta(layer_of(twin))
    assert_same_state(model, twin)


@EACH_KIND
def test_a_new_base_weight(kind):
    model, twin, x = ready(kind)
    new = torch.randn(7, 11)
    for each in (model, twin):
        layer_of(each).set_base_weight(new.clone())
    close(model, twin, x)
    assert_same_state(model, twin)
    for each in (model, twin):
        with torch.no_grad():
            layer_of(each).base_layer.weight.mul_(0.5)
    close(model, twin, x)
    assert_same_state(model, twin)


@EACH_KIND
def test_values_in_other_hands_are_seen(kind):
    model, twin, x = ready(kind)
    for each in (model, twin):
        layer = layer_of(each)
        held = layer.shira_weight if kind == "shira" else layer.supertuning_values
        held["default"] = nn.Parameter(torch.ones_like(held["default"]))
    close(model, twin, x)
    for each in (model, twin):
        values_of(layer_of(each)).requires_grad_(False)
    close(model, twin, x)
    assert not twin(x).requires_grad or kind == "supra"


@EACH_KIND
def test_other_indices_are_seen(kind):
    model, twin, x = ready(kind)
    for each in (model, twin):
        layer = layer_of(each)
        if kind == "shira":
            layer.shira_indices["default"] = layer.shira_indices["default"].flip(1)
        else:
            indices = layer.supertuning_indices["default"]
            indices.copy_(torch.randperm(77, generator=torch.Generator().manual_seed(1))[: len(indices)])
    close(model, twin, x)
    assert holds_delta(layer_of(twin))
    assert_same_state(model, twin)


@EACH_KIND
def test_hooks_on_the_base_layer_are_peft_s_to_skip(kind):
    model, twin, x = ready(kind)
    seen = []
    handles = [
        layer_of(each).base_layer.register_forward_hook(lambda *args: seen.append(args)) for each in (model, twin)
    ]
    assert pk.accelerate(twin).left_alone[0].reason == "its base layer has hooks"
    with pytest.warns(UserWarning, match="hooks set which will be ignored"):
        twin(x)
    assert torch.equal(twin(x), model(x)) and not seen and same_bits(model, twin)
    with model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(twin(x), model(x)) and len(seen) == 2
    for handle in handles:
        handle.remove()
    close(model, twin, x)
    assert holds_delta(layer_of(twin))


@EACH_KIND
def test_inference_mode_in_between(kind):
    model, twin, x = ready(kind)
    with torch.inference_mode():
        close(model, twin, x)
        with torch.no_grad():
            values_of(layer_of(twin)).mul_(2.0)
            values_of(layer_of(model)).mul_(2.0)
        close(model, twin, x)
    torch.testing.assert_close(gradients(twin, x), gradients(model, x), rtol=1e-4, atol=1e-4)
    assert_same_state(model, twin)


@EACH_KIND
def test_a_whole_model_through_its_states(kind, tmp_path):
    model, twin, _ = twins(adapted(kind))
    ids = tokens()
    for each in (model, twin):
        each(input_ids=ids, labels=ids).loss.backward()
    with model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(model(ids).logits, twin(ids).logits)
    torch.testing.assert_close(twin(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert_same_state(model, twin)
    model.eval(), twin.eval()
    expected = twin(ids).logits
    merged = twin.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    theirs = model.merge_and_unload()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, merged.state_dict()[name]), name
