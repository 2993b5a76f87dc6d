"""What slices of channels are compared with in a training step of a whole model.

    frozen model                      no adapter
    PEFT LoRA                         `get_peft_model` with its defaults, rank r in every linear of the decoder
    full fine-tuning                  every linear of the decoder trains, in the model's dtype like its moments
    PaCA                              the formula in plain PyTorch (`paca.py`) on the slices that ours trains
    ours, inject                      `pk.inject` on the model itself, with torch's fused AdamW
    ours, inject and SparseAdamW      the same with `pk.optim.SparseAdamW`, which writes back as it updates
    ours, co-permuted                 that with `co_permute=True`: what trains lies together in every weight
    ours, inject, SwiGLU not fused    "ours, inject" with `fuse_swiglu=False`

PaCA and ours train the same slices from the same values, off the base weights, in float32: their first losses
must agree. LoRA with `lora_b = 0` and full fine-tuning begin as the base model, whose first loss must be theirs. The
base weights are shared but for those that an arm changes.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels import channels
from peft_kernels.channels import Slice

from .limits import Shape
from .model_arms import FROZEN, TARGETS, ArmFamily, ModelArm, bare_model, decoder_linears, own_weights
from .paca import PaCALinear
from .suites import S2FTModelCase

LORA = "PEFT LoRA"
FULL = "full fine-tuning"
PACA = "PaCA"
INJECT = "ours, inject"
INJECT_SPARSE_ADAMW = "ours, inject and SparseAdamW"
CO_PERMUTED = "ours, co-permuted"
INJECT_NOT_FUSED = "ours, inject, SwiGLU not fused"
_OURS = (INJECT, INJECT_SPARSE_ADAMW, CO_PERMUTED, INJECT_NOT_FUSED)
_SEED = 1


def arm_names(case: S2FTModelCase) -> tuple[str, ...]:
    """The arms of a case."""
    return (FROZEN, LORA, FULL, PACA, *_OURS)


def same_loss(case: S2FTModelCase, name: str) -> str:
    """PaCA's for those that train its slices, the frozen model's for those that begin as it."""
    return PACA if name == PACA or name in _OURS else FROZEN


def _ratios(case: S2FTModelCase) -> dict[str, float]:
    return {"down": case.down, "o": case.o}


def slices(model: nn.Module, case: S2FTModelCase) -> dict[str, Slice]:
    """What trains, by path: as an `S2FTConfig` with these ratios chooses by default, from a seed."""
    return channels.select(model, _ratios(case), seed=_SEED).slices


def _values(path: str, weight: Tensor, indices: Tensor) -> Tensor:
    """`weight[:, indices]` and a random change of its size, float32; the same in every arm.

    So large that the loss moves by more than what the check of first losses lets pass.
    """
    original = weight.detach()[:, indices.to(weight.device)].float()
    generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
    return original + original.std() * torch.randn(original.shape, generator=generator).to(weight.device)


def _put_paca(model: nn.Module, parts: dict[str, Slice]) -> None:
    for path, part in parts.items():
        parent, _, name = path.rpartition(".")
        linear: Any = model.get_submodule(path)
        layer = PaCALinear(linear, part.indices.to(linear.weight.device), _values(path, linear.weight, part.indices))
        setattr(model.get_submodule(parent), name, layer)


def _inject(model: nn.Module, parts: dict[str, Slice], case: S2FTModelCase, name: str) -> None:
    fused = name != INJECT_NOT_FUSED
    values = {
        path: _values(path, model.get_submodule(path).weight, part.indices)  # type: ignore[arg-type]
        for path, part in parts.items()
    }
    config = pk.S2FTConfig(ratios=_ratios(case), fuse_swiglu=fused, co_permute=name == CO_PERMUTED)
    report = pk.inject(model, config, positions=parts)
    if fused != any(isinstance(module, pk.nn.SwiGLUMLP) for module in model.modules()):
        raise RuntimeError(
            f"fuse_swiglu={fused} did not do as it says, so this arm is not what its name says:\n{report}"
        )
    with torch.no_grad():
        for path, value in values.items():
            layer: Any = model.get_submodule(path)
            numbers = layer.indices if layer.order is None else layer.order[layer.indices]  # before they moved
            columns = torch.searchsorted(parts[path].indices.cpu(), numbers.cpu())
            layer.trainable.copy_(value[:, columns.to(value.device)])


def build(name: str, base: nn.Module, case: S2FTModelCase) -> ModelArm:
    """The arm `name` over the parameters of `base`, which itself stays as it is."""
    model = bare_model(base)
    linears = decoder_linears(model)
    if name == LORA:
        import peft

        config = peft.LoraConfig(r=case.r, lora_alpha=2 * case.r, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    elif name == FULL:
        own_weights(linears.values())
        for linear in linears.values():
            linear.weight.requires_grad_(True)
    elif name != FROZEN:
        parts = slices(model, case)
        own_weights(linears.values() if name == CO_PERMUTED else [linears[path] for path in parts])
        if name == PACA:
            _put_paca(model, parts)
        else:
            _inject(model, parts, case, name)
    arm = ModelArm(name, model.train(), None)
    parameters = list(arm.trainable().values())
    if name in (INJECT_SPARSE_ADAMW, CO_PERMUTED):
        arm.optimizer = pk.optim.SparseAdamW(parameters, lr=1e-4)
    elif name != FROZEN:
        arm.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    return arm


def ideal_ratio(model: nn.Module, case: S2FTModelCase) -> float:
    """Operations with slices over operations of the frozen model: two per element of a slice and token beyond it."""
    tokens = case.batch_size * case.sequence_length
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    frozen = sum(
        Shape(tokens, linear.in_features, linear.out_features, 1, linear.weight.element_size()).frozen_operations(True)
        for linear in linears.values()
    )
    parts = slices(model, case).items()
    added = sum(2 * tokens * linears[path].out_features * part.indices.numel() for path, part in parts)
    return 1.0 + added / frozen


S2FT = ArmFamily(
    arm_names,
    build,
    ideal_ratio,
    lambda case: LORA,
    same_loss,
    "torch.optim.AdamW(lr=1e-4, fused=True) on what trains, or SparseAdamW(lr=1e-4); none for the frozen model",
)
