"""The arms of sparse fine-tuning: ours, and PEFT's SHiRA from the same mask over weights that started the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import peft_kernels as pk

from ..reselection import Reselector
from .arms import OURS, SHIRA, Arm, copy_sharing_parameters, fused_adamw, make_arm, own_weights
from .errors import UserError, require
from .settings import Settings


def build(model: Any, settings: Settings) -> tuple[list[Arm], str]:
    """The arms, ours first, and what `inject` reported; arguments and errors are those of `build_arms`."""
    compare = settings.compare == "shira"
    other = copy_sharing_parameters(model) if compare else None
    keep_float32 = settings.adapter_dtype == "float32"
    config = _config(settings)
    report = pk.inject(model, config, seed=settings.seed, autocast_adapter_dtype=keep_float32)
    shira = None
    if other is not None:
        require("peft")
        layers = _layers(model)
        own_weights(other, layers)
        shira = _shira_model(other, list(layers), settings)
        pk.eject(model, merge=False)
        masks = {path: _mask(shira, path, layer) for path, layer in layers.items()}
        report = pk.inject(model, config, autocast_adapter_dtype=keep_float32, positions=masks)
    if settings.selection == "sm3":
        ours = make_arm(OURS, model, settings, lambda p: _sm3(model, p, settings))
    else:
        ours = make_arm(OURS, model, settings, lambda p: _adamw(p, settings))
    ours.reselector = Reselector(
        model,
        ours.optimizer,
        selection=config.selection,
        reselection_steps=config.reselection_steps,
        selection_accumulation_steps=config.selection_accumulation_steps,
        initial_reselection_rate=config.initial_reselection_rate,
        schedule=config.schedule,
        total_steps=settings.steps,
        seed=settings.seed,
    )
    arms = [ours]
    if shira is not None:
        arms.append(make_arm(SHIRA, shira, settings, lambda p: fused_adamw(p, settings)))
    return arms, str(report)


def _config(settings: Settings) -> pk.SparseDeltaConfig:
    return pk.SparseDeltaConfig(
        density=settings.density,
        lora_equivalent_rank=settings.r if settings.density is None else None,
        selection=settings.selection,  # type: ignore[arg-type]
        reselection_steps=settings.reselection_steps,
        selection_accumulation_steps=settings.selection_accumulation_steps,
        initial_reselection_rate=settings.reselection_rate,
        schedule=settings.reselection_schedule,  # type: ignore[arg-type]
        target_modules=settings.modules(),
        task_type="CAUSAL_LM",
    )


def _adamw(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    return pk.optim.SparseAdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def _sm3(model: nn.Module, parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    deltas = {id(layer.values) for layer in _layers(model).values()}
    if any(id(parameter) not in deltas for parameter in parameters):
        raise UserError("--selection sm3: the SM3 optimizer trains deltas only, and this model trains more than those")
    return pk.optim.SparseSM3(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def _layers(model: nn.Module) -> dict[str, pk.nn.SparseDeltaLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, pk.nn.SparseDeltaLinear)}


def _shira_model(base: nn.Module, paths: list[str], settings: Settings) -> nn.Module:
    """PEFT's SHiRA on the layers that ours adapts, with PEFT's own random masks."""
    from peft import ShiraConfig, get_peft_model

    config = ShiraConfig(r=settings.r, random_seed=settings.seed, target_modules=paths, task_type="CAUSAL_LM")
    model: Any = base
    return get_peft_model(model, config, autocast_adapter_dtype=settings.adapter_dtype == "float32")


def _mask(shira: Any, path: str, layer: pk.nn.SparseDeltaLinear) -> Tensor:
    """The positions that SHiRA trains in the layer at `path`, sorted."""
    rows, columns = shira.base_model.model.get_submodule(path).shira_indices["default"].long()
    return (rows * layer.in_features + columns).sort().values
