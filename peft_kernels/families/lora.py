"""LoRA as a family: factors per layer, in PEFT's files."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, nn

from .. import targets
from ..adapter_files import AdapterFiles
from ..config import LoraConfig
from ..nn.linear import takeover_obstacle
from ..nn.lora import LoRALinear
from .base import Built, Choices, Family


class _LoRA(Family):
    name = "lora"
    config_type = LoraConfig
    layer_type = LoRALinear

    def obstacle(self, linear: nn.Module, shared: bool) -> str | None:
        return takeover_obstacle(linear)

    def build(self, model: nn.Module, config: LoraConfig, linears: Mapping[str, nn.Linear], choices: Choices) -> Built:
        if choices.positions is not None:
            raise ValueError("LoRA chooses no entries, so positions must be None")
        layers: dict[str, LoRALinear] = {}
        for path, linear in linears.items():
            options = config.options(
                r=targets.pattern_value(config.rank_pattern, path, config.r),
                lora_alpha=targets.pattern_value(config.alpha_pattern, path, config.lora_alpha),
            )
            if not choices.autocast_adapter_dtype:
                options = replace(options, adapter_dtype=linear.weight.dtype)
            layers[path] = LoRALinear.over(linear, options, choices.generator)
        return Built(layers)

    def parameters(self, layer: LoRALinear) -> tuple[nn.Parameter, ...]:
        return layer.lora_a, layer.lora_b

    def tensors(self, path: str, layer: LoRALinear) -> dict[str, Tensor]:
        return {f"{path}.lora_A.weight": layer.lora_a, f"{path}.lora_B.weight": layer.lora_b}

    def described(self, layers: Mapping[str, LoRALinear], every_path: Collection[str]) -> LoraConfig:
        options = [layer.options for layer in layers.values()]
        if len({option.use_rslora for option in options}) > 1:
            raise ValueError("one adapter file cannot hold layers with and without use_rslora")
        r = Counter(option.r for option in options).most_common(1)[0][0]
        lora_alpha = Counter(option.lora_alpha for option in options).most_common(1)[0][0]
        return LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=options[0].lora_dropout,
            use_rslora=options[0].use_rslora,
            target_modules=targets.names_for(layers, every_path),
            rank_pattern={f"^{re.escape(path)}": layer.r for path, layer in layers.items() if layer.r != r},
            alpha_pattern={
                f"^{re.escape(path)}": layer.lora_alpha
                for path, layer in layers.items()
                if layer.lora_alpha != lora_alpha
            },
        )

    def check_function(self, config: LoraConfig, layers: Mapping[str, LoRALinear], files: AdapterFiles) -> None:
        for path, layer in layers.items():
            alpha = targets.pattern_value(config.alpha_pattern, path, config.lora_alpha)
            scaling = config.options(r=layer.r, lora_alpha=alpha).scaling
            if not math.isclose(scaling, layer.options.scaling):
                raise ValueError(
                    f"the adapter in {files.directory} scales {path} by {scaling:g} (lora_alpha={alpha:g}, "
                    f"r={layer.r}, use_rslora={config.use_rslora}), the model by {layer.options.scaling:g}; inject "
                    "with the file's configuration, or eject and load into the bare model"
                )


LORA = _LoRA()
