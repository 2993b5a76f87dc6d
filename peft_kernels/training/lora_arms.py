"""LoRA's arms: our layers, and PEFT's with the same initial factors over the very same frozen weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

import peft_kernels as pk

from .arms import OURS, PEFT, Arm, copy_sharing_parameters, fused_adamw, make_arm
from .errors import require
from .settings import Settings


def build(model: Any, settings: Settings) -> tuple[list[Arm], str]:
    """The arms, ours first, and what `inject` reported; arguments and errors are those of `build_arms`."""
    compare = settings.compare == "peft"
    if compare:
        require("peft")
    other = copy_sharing_parameters(model) if compare else None
    keep_float32 = settings.adapter_dtype == "float32"
    report = pk.inject(model, _config(settings), seed=settings.seed, autocast_adapter_dtype=keep_float32)
    models = {OURS: model} if other is None else {OURS: model, PEFT: _peft_model(other, model, settings)}
    arms = [make_arm(name, each, settings, lambda p: fused_adamw(p, settings)) for name, each in models.items()]
    return arms, str(report)


def _config(settings: Settings) -> pk.LoraConfig:
    return pk.LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        target_modules=settings.modules(),
        task_type="CAUSAL_LM",
    )


def _peft_model(base: nn.Module, ours: nn.Module, settings: Settings) -> nn.Module:
    """PEFT's model with the configuration and the initial weights of ours, passed through an adapter directory."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory(prefix="peft-kernels-") as directory:
        pk.save_adapter(ours, directory)
        return PeftModel.from_pretrained(
            base, directory, is_trainable=True, autocast_adapter_dtype=settings.adapter_dtype == "float32"
        )


def load_in_peft(peft_model: nn.Module, directory: Path) -> None:
    """Adds the adapter that was written to `directory` to a PEFT model as a user would, and makes it the active one."""
    peft_model.load_adapter(str(directory), adapter_name="written")  # type: ignore[operator]
    peft_model.set_adapter("written")  # type: ignore[operator]
