"""What LoRA is compared with in a training step of a whole model.

    frozen model                  no adapter
    PEFT                          `get_peft_model` with its defaults: float32 factors
    PEFT, adapters in base dtype  the same with `autocast_adapter_dtype=False`
    ours, accelerate              the PEFT arm's model after `pk.accelerate`
    ours, inject                  `pk.inject` on the model itself with its defaults: float32 factors

All arms share the base weights. The optimizer is the fused AdamW, the default of transformers' Trainer.
"""

from __future__ import annotations

import re
import zlib
from typing import Any

import torch
from torch import nn

import peft_kernels as pk

from .limits import Shape
from .model_arms import FROZEN, TARGETS, ArmFamily, ModelArm, bare_model
from .peers import PEFT, PEFT_BASE_DTYPE
from .suites import ModelCase

ACCELERATE = "ours, accelerate"
INJECT = "ours, inject"
_FACTOR = re.compile(r"^(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<factor>[ABab])(?:\.\w+)*$")


def arm_names(case: ModelCase) -> tuple[str, ...]:
    """The arms of a case; over float32 the adapters are in the base dtype anyway."""
    base_dtype = () if case.dtype == torch.float32 else (PEFT_BASE_DTYPE,)
    return (FROZEN, PEFT, *base_dtype, ACCELERATE, INJECT)


def _adapter_settings(case: ModelCase) -> dict[str, Any]:
    return {
        "r": case.r,
        "lora_alpha": 2 * case.r,
        "lora_dropout": case.dropout_p,
        "target_modules": list(TARGETS),
    }


def _with_adapter(name: str, model: Any, case: ModelCase) -> nn.Module:
    if name == INJECT:
        pk.inject(model, pk.LoraConfig(**_adapter_settings(case)))
        return model
    import peft

    config = peft.LoraConfig(**_adapter_settings(case), task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=name != PEFT_BASE_DTYPE)
    if name == ACCELERATE:
        report = pk.accelerate(adapted)
        if report.left_alone:
            raise RuntimeError(f"accelerate left layers alone, so this arm would not be ours:\n{report}")
    return adapted


def set_adapter_values(parameters: dict[str, nn.Parameter]) -> None:
    """The same random factors in every arm, keyed by the layer's path; nonzero, or half of the products are idle."""
    for name, parameter in parameters.items():
        found = _FACTOR.match(name)
        if found is None:
            raise RuntimeError(f"expected only LoRA factors to train, got {name}")
        factor = found["factor"].upper()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{found['path']}.{factor}".encode()))
        deviation = parameter.shape[1] ** -0.5 if factor == "A" else 0.01
        values = torch.randn(parameter.shape, generator=generator) * deviation
        with torch.no_grad():
            parameter.copy_(values)


def build(name: str, base: nn.Module, case: ModelCase) -> ModelArm:
    """The arm `name` over the parameters of `base`, which itself stays as it is."""
    model = bare_model(base)
    if name == FROZEN:
        return ModelArm(name, model.train(), None)
    arm = ModelArm(name, _with_adapter(name, model, case).train(), None)
    parameters = arm.trainable()
    set_adapter_values(parameters)
    arm.optimizer = torch.optim.AdamW(list(parameters.values()), lr=1e-4, fused=True)
    return arm


def ideal_ratio(model: nn.Module, case: ModelCase) -> float:
    """Operations with adapters over operations of the frozen model, counting linears alone (attention left out)."""
    tokens = case.batch_size * case.sequence_length
    frozen = added = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shape = Shape(tokens, module.in_features, module.out_features, case.r, module.weight.element_size())
            frozen += shape.frozen_operations(backward=True)
            added += shape.added_operations(backward=True) if name.rpartition(".")[2] in TARGETS else 0
    return 1.0 + added / frozen


LORA = ArmFamily(
    arm_names,
    build,
    ideal_ratio,
    lambda case: PEFT,
    lambda case, name: None if case.dropout_p > 0.0 else PEFT,
    "torch.optim.AdamW(lr=1e-4, fused=True) on the adapter; none for the frozen model",
)
