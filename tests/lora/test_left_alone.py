"""PEFT layers that `accelerate` leaves alone, each with its reason, and that they then compute as without it."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import peft_kernels as pk

from .peft_layer import layer_of, small

peft = pytest.importorskip("peft")


def base_of(model):
    return layer_of(model).get_base_layer()


def with_hook(part):
    model = small(lora_dropout=0.1)
    layer = layer_of(model)
    module = getattr(layer, part) if part == "base_layer" else getattr(layer, part)["default"]
    module.register_forward_hook(lambda *args: None)
    return model


def with_two_of(*kinds):
    model = nn.Sequential(*kinds)
    names = [str(index) for index in range(len(kinds))]
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names))


def with_parametrized_base():
    model = small()
    nn.utils.parametrizations.weight_norm(layer_of(model).base_layer)
    return model


def with_forward_replaced(where):
    model = small()
    module = layer_of(model) if where == "layer" else layer_of(model).base_layer
    module.forward = module.forward
    return model


def with_quantized_weight():
    model = small()
    base = layer_of(model).base_layer
    base.weight = nn.Parameter(base.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return model


def transposed():
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 6)
    return peft.get_peft_model(
        nn.Sequential(conv), peft.LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=True, init_lora_weights=False)
    )


LEFT_ALONE = {
    "DoRA": (lambda: small(use_dora=True, init_lora_weights=True), "its adapter is a variant of LoRA"),
    "lora_bias": (lambda: small(lora_bias=True), "its adapter has a bias"),
    "Conv1D": (transposed, "stores the weight transposed"),
    "embedding": (lambda: with_two_of(nn.Embedding(6, 4)), "no fused kernel for PEFT's lora.layer.Embedding"),
    "convolution": (lambda: with_two_of(nn.Conv2d(2, 2, 1)), "no fused kernel for PEFT's lora.layer.Conv2d"),
    "hook on the base": (lambda: with_hook("base_layer"), "a module inside it has hooks"),
    "hook on A": (lambda: with_hook("lora_A"), "a module inside it has hooks"),
    "hook on B": (lambda: with_hook("lora_B"), "a module inside it has hooks"),
    "hook on dropout": (lambda: with_hook("lora_dropout"), "a module inside it has hooks"),
    "parametrized": (with_parametrized_base, "its base layer is a .*Parametrized|its weight is parametrized"),
    "replaced layer": (lambda: with_forward_replaced("layer"), "its forward is replaced on the instance"),
    "replaced base": (lambda: with_forward_replaced("base"), "inside it, its forward is replaced on the instance"),
    "quantized": (with_quantized_weight, "its weight is float8_e4m3fn"),
    "saved": (
        lambda: peft.get_peft_model(
            nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)),
            peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]),
        ),
        "it is trained in full .modules_to_save",
    ),
}


@pytest.mark.parametrize(("make", "message"), LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_what_cannot_be_fused_is_left_alone_with_the_reason(make, message, fused_calls):
    model = make()
    twin = copy.deepcopy(model)
    report = pk.accelerate(model)
    assert len(report.left_alone) == 1 and re.search(message, report.left_alone[0].reason), report.left_alone
    if "quantized" in report.left_alone[0].reason:
        return  # PEFT itself needs a dequantizing layer here
    x = {nn.Conv2d: torch.zeros(1, 2, 3, 3), nn.Embedding: torch.arange(3)}.get(type(base_of(twin)), torch.randn(3, 6))
    outputs = []
    for each in (model, twin):
        torch.manual_seed(0)
        outputs.append(each(x))
    assert torch.equal(*outputs)
    assert len(fused_calls) == len(report.fused)


def test_a_global_hook_is_seen(fused_calls):
    model = small()
    pk.accelerate(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    model(torch.randn(3, 6))
    handle.remove()
    assert layer_of(model).lora_A["default"] in seen and not fused_calls
    model(torch.randn(3, 6))
    assert len(fused_calls) == 1
