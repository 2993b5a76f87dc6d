"""The kinds of adapter that `inject`, `save_adapter` and `load_adapter` know: one object per family."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..config import AdapterConfig
from .base import AdapterLayer, Choices, Family
from .lora import LORA
from .s2ft import S2FT
from .sparse_delta import SPARSE_DELTA

FAMILIES: tuple[Family, ...] = (LORA, S2FT, SPARSE_DELTA)
LAYER_TYPES = tuple(kind for family in FAMILIES for kind in family.layer_types)


def family_of_config(config: Any) -> Family:
    """The family that a configuration, ours or PEFT's, belongs to; raises TypeError for any other object."""
    if isinstance(config, AdapterConfig):
        return next(family for family in FAMILIES if isinstance(config, family.config_type))
    if hasattr(config, "peft_type") and hasattr(config, "to_dict"):
        return family_of_file(config.to_dict())
    names = ", ".join(family.config_type.__name__ for family in FAMILIES)
    raise TypeError(f"config must be one of {names}, got {type(config).__name__}")


def family_of_file(values: dict[str, Any]) -> Family:
    """The family that the contents of an `adapter_config.json` belong to; LoRA where they do not say."""
    peft_type = values.get("peft_type")
    peft_type = getattr(peft_type, "value", peft_type) or "LORA"
    for family in FAMILIES:
        if peft_type in family.config_type.peft_types:
            return family
    known = ", ".join(repr(name) for family in FAMILIES for name in family.config_type.peft_types)
    raise ValueError(f"peft_type must be one of {known}, got {peft_type!r}")


def family_of_layers(layers: Iterable[object]) -> Family:
    """The one family of a model's adapter layers; raises ValueError where they are of several."""
    found = {family.name: family for layer in layers for family in FAMILIES if isinstance(layer, family.layer_types)}
    if len(found) != 1:
        raise ValueError(
            f"the model's adapter layers must be of one family, they are {', '.join(sorted(found)) or 'none'}"
        )
    return next(iter(found.values()))


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The model's adapter layers by path, a layer used at several places once, by its first."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LAYER_TYPES)}


__all__ = [
    "FAMILIES",
    "LAYER_TYPES",
    "AdapterLayer",
    "Choices",
    "Family",
    "adapter_layers",
    "family_of_config",
    "family_of_file",
    "family_of_layers",
]
