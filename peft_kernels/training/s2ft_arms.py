"""The arms of S2FT: ours, and a plain PaCA of the same slices or PEFT's LoRA, over weights that started the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import peft_kernels as pk

from ..channels import Slice
from ..nn.s2ft_layer import S2FTLayer
from .arms import OURS, PACA, PEFT_LORA, Arm, copy_sharing_parameters, fused_adamw, make_arm, own_weights
from .errors import require
from .method_options import parse_ratios
from .plain_paca import PlainPaCALinear
from .settings import Settings


def build(
    model: Any,
    settings: Settings,
    batches: Callable[[int], Iterable[Tensor]],
    channels: Mapping[str, Slice] | None,
) -> tuple[list[Arm], str]:
    """The arms, ours first, and what `inject` reported; arguments and errors are those of `build_arms`."""
    if settings.compare == "peft":
        require("peft")
    other = copy_sharing_parameters(model) if settings.compare in ("paca", "peft") else None
    report = pk.inject(
        model,
        _config(settings),
        seed=settings.seed,
        autocast_adapter_dtype=settings.adapter_dtype == "float32",
        positions=channels,
        calibration=None if settings.selection in ("random", "weight") else _calibration(batches, settings),
    )
    arms = [make_arm(OURS, model, settings, lambda p: _adamw(p, settings))]
    if other is not None:
        layers = _layers(model)
        own_weights(other, layers)  # after inject, which may have moved channels
        if settings.compare == "paca":
            _replace_by_paca(other, layers)
            name = PACA
        else:
            other, name = _lora_model(other, settings), PEFT_LORA
        arms.append(make_arm(name, other, settings, lambda p: fused_adamw(p, settings)))
    return arms, str(report)


def _config(settings: Settings) -> pk.S2FTConfig:
    by_role = settings.ratios is not None
    modules = None if by_role and settings.target_modules == "all-linear" else settings.modules()
    return pk.S2FTConfig(
        ratios=None if settings.ratios is None else parse_ratios(settings.ratios),
        ratio=settings.ratio,
        dim=settings.dim,  # type: ignore[arg-type]
        selection=settings.selection,  # type: ignore[arg-type]
        largest=settings.largest,
        budget=settings.budget,  # type: ignore[arg-type]
        co_permute=settings.co_permute,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )


def _calibration(batches: Callable[[int], Iterable[Tensor]], settings: Settings) -> Iterator[dict[str, Tensor]]:
    for batch in batches(settings.calibration_batches):
        yield {"input_ids": batch, "labels": batch}


def _adamw(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    return pk.optim.SparseAdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def _layers(model: nn.Module) -> dict[str, S2FTLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, S2FTLayer)}


def _replace_by_paca(model: nn.Module, layers: Mapping[str, S2FTLayer]) -> None:
    model.requires_grad_(False)
    for path, layer in layers.items():
        linear: Any = model.get_submodule(path)
        parent, _, name = path.rpartition(".")
        paca = PlainPaCALinear(linear, layer.indices.clone(), layer.dim, layer.trainable.dtype)
        setattr(model.get_submodule(parent), name, paca)


def _lora_model(base: Any, settings: Settings) -> nn.Module:
    """PEFT's LoRA on `--target-modules`."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        target_modules=settings.modules(),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config, autocast_adapter_dtype=settings.adapter_dtype == "float32")
