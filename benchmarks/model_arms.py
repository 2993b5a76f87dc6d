"""One training step of a whole model, per arm: forward, loss, backward, optimizer step, gradients dropped.

    frozen model                  no adapter; backward carries dx from the loss to the embeddings' output
    PEFT                          `get_peft_model` with its defaults: float32 factors
    PEFT, adapters in base dtype  the same with `autocast_adapter_dtype=False`
    ours, accelerate              the PEFT arm's model after `pk.accelerate`
    ours, inject                  `pk.inject` on the model itself with its defaults: float32 factors

All arms share the base weights, carry the same adapter values and let gradients flow to the embeddings' output, so
that each forms dx in every layer. The optimizer is the fused AdamW, the default of transformers' Trainer.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels.training.arms import copy_sharing_parameters

from .limits import Shape
from .peers import PEFT, PEFT_BASE_DTYPE
from .suites import ModelCase

FROZEN = "frozen model"
ACCELERATE = "ours, accelerate"
INJECT = "ours, inject"
OPTIMIZER = "torch.optim.AdamW(lr=1e-4, fused=True) on the adapter; none for the frozen model"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FACTOR = re.compile(r"^(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<factor>[ABab])(?:\.\w+)*$")


def arm_names(dtype: torch.dtype) -> tuple[str, ...]:
    """The arms for a base model of `dtype`; over float32 the adapters are in the base dtype anyway."""
    base_dtype = () if dtype == torch.float32 else (PEFT_BASE_DTYPE,)
    return (FROZEN, PEFT, *base_dtype, ACCELERATE, INJECT)


@dataclass
class ModelArm:
    """A model in training mode with its optimizer (None when nothing trains)."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None

    def forward_backward(self, batch: Tensor) -> Tensor:
        """The loss, detached; gradients are left in `.grad`. batch int64 `[batch_size, sequence_length]`."""
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        return loss.detach()

    def step(self, batch: Tensor) -> Tensor:
        """One whole training step; returns the loss."""
        loss = self.forward_backward(batch)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def resident_tensors(self) -> Iterator[Tensor]:
        """Every tensor that stays alive between steps: parameters, buffers, optimizer state."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


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


def _set_adapter_values(parameters: dict[str, nn.Parameter], case: ModelCase) -> None:
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
    model: Any = copy_sharing_parameters(base)
    model.config.use_cache = False
    model.requires_grad_(False)
    model.enable_input_require_grads()
    if name == FROZEN:
        return ModelArm(name, model.train(), None)
    arm = ModelArm(name, _with_adapter(name, model, case).train(), None)
    parameters = arm.trainable()
    _set_adapter_values(parameters, case)
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


def batches(tokenizer: Any, case: ModelCase, count: int) -> list[Tensor]:
    """`count` batches int64 `[batch_size, sequence_length]` of real text: the source of a standard library module."""
    import argparse
    import inspect

    tokens = tokenizer(inspect.getsource(argparse), add_special_tokens=False, verbose=False)["input_ids"]
    size = case.batch_size * case.sequence_length
    if len(tokens) < count * size:
        raise ValueError(f"batches: the text has {len(tokens)} tokens, {count} batches need {count * size}")
    return [
        torch.tensor(tokens[i * size : (i + 1) * size]).view(case.batch_size, case.sequence_length)
        for i in range(count)
    ]
