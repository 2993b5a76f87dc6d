"""Saving and loading the adapter of a PEFT model: PEFT does it, we check first and put files in place whole."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import peft
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .. import targets
from ..adapter_files import KEY_PREFIX, AdapterFiles, check_tensors, install, without_wrapper_copies
from ..config import LoraConfig


def save_peft_adapter(model: nn.Module, directory: str | os.PathLike[str], is_main_process: bool) -> None:
    """Runs the model's own `save_pretrained` beside `directory`, then moves its files in, weights before configuration.

    Raises:
        TypeError: the model cannot save itself, as a bare module with PEFT layers cannot.
    """
    save = getattr(model, "save_pretrained", None)
    if save is None or not hasattr(model, "peft_config"):
        raise TypeError(
            f"model must be a PeftModel or a transformers model with an adapter, got {type(model).__name__}; "
            "save the outermost model"
        )
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"directory must be a directory, got the file {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        save(beside, is_main_process=is_main_process)
        written = sorted(path for path in Path(beside).rglob("*") if path.is_file())
        pairs = [(path, folder / path.relative_to(beside)) for path in written]
        for _, target in pairs:
            target.parent.mkdir(parents=True, exist_ok=True)
        install(sorted(pairs, key=lambda pair: pair[1].suffix != ".safetensors"))


def load_peft_adapter(model: nn.Module, files: AdapterFiles) -> None:
    """Overwrites the model's one active adapter with a file's tensors.

    Raises:
        ValueError: the file does not fit, or computes another function; the model is as it was.
        TypeError: the model does not know its PEFT configurations, as a bare module with PEFT layers does not.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        raise TypeError(
            f"model must be a PeftModel or a transformers model with an adapter, got {type(model).__name__}"
        )
    name = _active_adapter(model)
    state = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    expected = without_wrapper_copies(state)
    if not any(key.startswith(KEY_PREFIX) for key in expected):  # transformers' own adapters carry no prefix
        expected = {KEY_PREFIX + key: tensor for key, tensor in expected.items()}
    check_tensors(files, expected)
    _check_function(model, name, files)
    result: Any = peft.set_peft_model_state_dict(model, files.tensors, adapter_name=name)
    if result.unexpected_keys:
        raise ValueError(f"PEFT found no place for {', '.join(result.unexpected_keys)} of {files.directory}")


def _active_adapter(model: nn.Module) -> str:
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    active = {name for layer in layers for name in layer.active_adapters}
    if len(active) != 1:
        raise ValueError(f"model must have one active adapter to load into, it has {len(active)}: {sorted(active)}")
    return active.pop()


def _check_function(model: nn.Module, name: str, files: AdapterFiles) -> None:
    """Raises when the file's scaling is not the layers': the same tensors would compute something else."""
    config = LoraConfig.from_dict({**files.config, "use_dora": False})  # DoRA's extra tensors are checked by key
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or name not in layer.scaling:
            continue
        plain = path.removeprefix(KEY_PREFIX)
        alpha = targets.pattern_value(config.alpha_pattern, plain, config.lora_alpha)
        scaling = config.options(r=layer.r[name], lora_alpha=alpha).scaling
        if not math.isclose(scaling, layer.scaling[name]):
            raise ValueError(
                f"the adapter in {files.directory} scales {plain} by {scaling:g}, the model by {layer.scaling[name]:g}"
            )
