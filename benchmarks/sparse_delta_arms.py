"""What sparse deltas are compared with in a training step of a whole model.

    frozen model                   no adapter
    PEFT SHiRA                     PEFT's random masks, as many entries as LoRA of rank r has parameters
    PEFT Super-Tuning              PEFT's masks of the largest entries, a share of each weight
    ours, accelerate               the PEFT arm's model after `pk.accelerate`
    ours, inject                   `pk.inject` on the model itself, with torch's fused AdamW
    ours, inject and SparseAdamW   the same with `pk.optim.SparseAdamW`, which writes back as it updates

All arms train the same entries in float32. The base weights are shared but for those that ours writes its deltas into.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

import peft_kernels as pk

from .limits import Shape
from .model_arms import FROZEN, TARGETS, ArmFamily, ModelArm, bare_model, decoder_linears, own_weights
from .suites import SparseModelCase

SHIRA = "PEFT SHiRA"
SUPER_TUNING = "PEFT Super-Tuning"
ACCELERATE = "ours, accelerate"
INJECT = "ours, inject"
INJECT_SPARSE_ADAMW = "ours, inject and SparseAdamW"
_SEED = 1


def peft_name(case: SparseModelCase) -> str:
    """The PEFT method that trains as many entries: SHiRA counts by rank, Super-Tuning by share."""
    return SHIRA if case.density is None else SUPER_TUNING


def arm_names(case: SparseModelCase) -> tuple[str, ...]:
    """The arms of a case."""
    return (FROZEN, peft_name(case), ACCELERATE, INJECT, INJECT_SPARSE_ADAMW)


def _peft_model(model: Any, case: SparseModelCase) -> Any:
    import peft

    common: dict[str, Any] = {"target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    config: Any
    if case.density is None:
        assert case.r is not None
        config = peft.ShiraConfig(r=case.r, random_seed=_SEED, **common)
    else:
        config = peft.SupertuningConfig(sparsity=1.0 - case.density, **common)
    return peft.get_peft_model(model, config)


def _positions(case: SparseModelCase, linear: nn.Linear) -> Tensor:
    """The entries that PEFT's method trains in this layer, sorted."""
    weight = linear.weight.detach()
    if case.density is None:
        from peft.tuners.shira.mask_functions import random_mask

        return random_mask(linear, case.r, random_seed=_SEED).flatten().nonzero().flatten()
    count = int(weight.numel() * (1 - (1.0 - case.density)))
    return weight.abs().flatten().topk(count).indices.sort().values


def _values(path: str, count: int) -> Tensor:
    """The same small changes in every arm, in order of position."""
    generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
    return torch.randn(count, generator=generator) * 1e-3


@torch.no_grad()
def _set_peft_values(model: nn.Module) -> None:
    for path, module in model.named_modules():
        plain = path.removeprefix("base_model.model.")
        if hasattr(module, "shira_weight"):
            parameter = module.shira_weight["default"]
            parameter.copy_(_values(plain, parameter.numel()))
        elif hasattr(module, "supertuning_values"):
            parameter = module.supertuning_values["default"]
            rank = module.supertuning_indices["default"].argsort().argsort().cpu()
            parameter.copy_(_values(plain, parameter.numel())[rank])


def _ours(model: nn.Module, case: SparseModelCase) -> None:
    positions = {path: _positions(case, linear) for path, linear in decoder_linears(model).items()}
    pk.inject(model, pk.SparseDeltaConfig(selection="fixed", target_modules=list(TARGETS)), positions=positions)
    with torch.no_grad():
        for path in positions:
            values = model.get_submodule(path).values
            values.copy_(_values(path, values.numel()))


def build(name: str, base: nn.Module, case: SparseModelCase) -> ModelArm:
    """The arm `name` over the parameters of `base`, which itself stays as it is."""
    model = bare_model(base)
    if name == FROZEN:
        return ModelArm(name, model.train(), None)
    if name != peft_name(case):
        own_weights(decoder_linears(model).values())
    if name in (INJECT, INJECT_SPARSE_ADAMW):
        _ours(model, case)
    else:
        model = _peft_model(model, case)
        _set_peft_values(model)
    if name == ACCELERATE:
        report = pk.accelerate(model)
        if report.left_alone:
            raise RuntimeError(f"accelerate left layers alone, so this arm would not be ours:\n{report}")
    arm = ModelArm(name, model.train(), None)
    parameters = list(arm.trainable().values())
    if name == INJECT_SPARSE_ADAMW:
        arm.optimizer = pk.optim.SparseAdamW(parameters, lr=1e-4)
    else:
        arm.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    return arm


def ideal_ratio(model: nn.Module, case: SparseModelCase) -> float:
    """Operations with deltas over operations of the frozen model: two per entry and token beyond it."""
    tokens = case.batch_size * case.sequence_length
    frozen = added = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shape = Shape(tokens, module.in_features, module.out_features, 1, module.weight.element_size())
            frozen += shape.frozen_operations(backward=True)
            if name.rpartition(".")[2] in TARGETS:
                size = module.weight.numel()
                share = case.density
                entries = size * share if share else (case.r or 0) * (module.in_features + module.out_features)
                added += 2 * tokens * round(entries)
    return 1.0 + added / frozen


SPARSE_DELTA = ArmFamily(
    arm_names,
    build,
    ideal_ratio,
    peft_name,
    lambda case, name: peft_name(case),
    "torch.optim.AdamW(lr=1e-4, fused=True) on the deltas, or SparseAdamW(lr=1e-4); none for the frozen model",
)
