"""Which layers a configuration names: PEFT's matching rules, on paths."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from .config import AdapterConfig

ALL_LINEAR = "all-linear"
_MAMBA_TYPES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})


def ends_in(path: str, name: str) -> bool:
    """Whether `path` is `name` or ends in `.name`."""
    return path == name or path.endswith(f".{name}")


def _named_by(names: Collection[str] | str, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    parts = path.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def _in_chosen_layer(config: AdapterConfig, path: str) -> bool:
    """Whether the first index in `path` (below `layers_pattern`, when given) is in `layers_to_transform`."""
    chosen = config.layers_to_transform
    if chosen is None or chosen == []:
        return True
    lists = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    patterns = (
        [rf"(?:^|.*?\.){name}\.(?P<index>\d+)\." for name in lists] if lists else [r".*?\.[^.]*\.(?P<index>\d+)\."]
    )
    found = next(filter(None, (re.match(pattern, path) for pattern in patterns)), None)
    if found is None:
        return False
    return int(found["index"]) in ([chosen] if isinstance(chosen, int) else chosen)


def exclusion(config: AdapterConfig, path: str) -> str | None:
    """Why the configuration keeps `path` out whatever `target_modules` says; None when it does not."""
    if config.exclude_modules and _named_by(config.exclude_modules, path):
        return "exclude_modules names it"
    for name in config.modules_to_save or ():
        if re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path):
            return f"modules_to_save trains {name} in full"
    return None


def is_target(config: AdapterConfig, path: str) -> bool:
    """Whether `target_modules` (not "all-linear"), `layers_to_transform` and `layers_pattern` name `path`."""
    targets = config.target_modules
    if targets is None or not _named_by(targets, path):
        return False
    # A path spelled out in full is meant, whatever layers_to_transform says; that is PEFT's rule.
    return path in targets if isinstance(targets, list) and path in targets else _in_chosen_layer(config, path)


def wants_all_linear(config: AdapterConfig) -> bool:
    """Whether the configuration asks for every linear layer, by name or by saying nothing."""
    targets = config.target_modules
    return targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR)


def output_layer(model: nn.Module, config: AdapterConfig) -> nn.Module | None:
    """The module that "all-linear" leaves out: the output embedding, or a sequence classifier's head."""
    getter = getattr(model, "get_output_embeddings", None)
    layer = getter() if callable(getter) else None
    if layer is None and config.task_type == "SEQ_CLS":
        layer = getattr(model, "score", None) or getattr(model, "classifier", None)
    return layer if isinstance(layer, nn.Module) else None


def bypassed(model: nn.Module, path: str, parent: nn.Module) -> str | None:
    """Why an update in the module at `path` would not take effect: its owner reads the weight without calling it."""
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"nn.{type(parent).__name__} reads its weight without calling it"
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _MAMBA_TYPES and path.rpartition(".")[2] in ("out_proj", "conv1d"):
        return f"{model_type}'s fused kernels read its weight without calling it"
    return None


def pattern_value(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first pattern whose regular expression matches the end of `path`, at a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def names_for(paths: Iterable[str], every_path: Iterable[str]) -> list[str] | str:
    """`target_modules` that name exactly `paths` among a model's module paths, as short as they can be.

    Last components where no other module shares them, else whole paths, else a regular expression.
    """
    wanted, everything = set(paths), list(every_path)
    for names in (sorted({path.rpartition(".")[2] for path in wanted}), sorted(wanted)):
        known = set(names)
        if {path for path in everything if _named_by(known, path)} == wanted:
            return names
    return "|".join(re.escape(path) for path in sorted(wanted))
