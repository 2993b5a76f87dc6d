"""Saving and loading the adapter of a PEFT model: PEFT does it, we check first and put files in place whole."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .. import targets
from ..adapter_files import KEY_PREFIX, AdapterFiles, check_tensors, install, without_wrapper_copies
from ..config import LoraConfig
from . import peft_sparse, peft_sparse_delta


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
    _check_method(configs[name], files)
    check_tensors(files, expected)
    _check_function(model, name, files)
    _check_indices(model, name, files)
    result: Any = peft.set_peft_model_state_dict(model, files.tensors, adapter_name=name)
    if result.unexpected_keys:
        raise ValueError(f"PEFT found no place for {', '.join(result.unexpected_keys)} of {files.directory}")


def _active_adapter(model: nn.Module) -> str:
    layers: list[Any] = [module for module in model.modules() if isinstance(module, _LAYERS)]
    active = {name for layer in layers for name in layer.active_adapters}
    if len(active) != 1:
        raise ValueError(f"model must have one active adapter to load into, it has {len(active)}: {sorted(active)}")
    return active.pop()


def _check_function(model: nn.Module, name: str, files: AdapterFiles) -> None:
    """Raises when the file's scaling is not the layers': the same tensors would compute something else."""
    for path, layer in model.named_modules():
        if not isinstance(layer, _LAYERS):
            continue
        plain = path.removeprefix(KEY_PREFIX)
        for what, found, present in _scalings(layer, name, plain, files):
            if not math.isclose(found, present):
                raise ValueError(
                    f"the adapter in {files.directory} scales {what} by {found:g}, the model by {present:g}"
                )


def _scalings(layer: Any, name: str, path: str, files: AdapterFiles) -> Iterator[tuple[str, float, float]]:
    """What is scaled in a layer, by how much for the file, and by how much for the layer."""
    if isinstance(layer, LoraLayer):
        if name in layer.scaling:
            # DoRA's extra tensors are checked by key.
            config = LoraConfig.from_dict({**files.config, "use_dora": False})
            lora_alpha = targets.pattern_value(config.alpha_pattern, path, config.lora_alpha)
            yield path, config.options(r=layer.r[name], lora_alpha=lora_alpha).scaling, layer.scaling[name]
    elif isinstance(layer, peft_sparse.ShiraLinear):
        if name in layer.scaling:  # set while running, never saved
            yield path, 1.0, layer.scaling[name]
    elif r := layer.supertuning_rank.get(name):
        alpha = files.config.get("lora_alpha")
        if not isinstance(alpha, int | float):
            raise ValueError(f"lora_alpha in {files.directory} must be a number, got {alpha!r}")
        yield f"the factors of {path}", alpha / r, layer.supertuning_lora_alpha[name] / r


def _check_method(config: Any, files: AdapterFiles) -> None:
    """Raises when the file is of another PEFT method than the model's adapter."""
    expected, found = str(getattr(config.peft_type, "value", config.peft_type)), files.config.get("peft_type")
    if found != expected:
        raise ValueError(f"the adapter in {files.directory} is of type {found!r}, the model's of {expected!r}")


def _check_indices(model: nn.Module, name: str, files: AdapterFiles) -> None:
    """Raises when a file's positions are not distinct ones inside their weight."""
    for path, layer in model.named_modules():
        if not isinstance(layer, _SPARSE):
            continue
        prefix = path if path.startswith(KEY_PREFIX) else KEY_PREFIX + path
        for key in (f"{prefix}.shira_indices", f"{prefix}.supertuning_indices"):
            if key in files.tensors:
                reason = peft_sparse_delta.indices_obstacle(layer, name, files.tensors[key])
                if reason is not None:
                    raise ValueError(f"{key} in {files.directory} does not fit the model: {reason}")


_SPARSE = tuple(peft_sparse.ACCELERATED)
_LAYERS = (LoraLayer, *_SPARSE)
