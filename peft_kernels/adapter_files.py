"""An adapter on disk: PEFT's `adapter_config.json` and `adapter_model.safetensors`, written whole, read warily."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
"""What PEFT puts in front of every path."""


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter directory holds: the configuration as read, and the tensors by key, on the CPU."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def install(pairs: Iterable[tuple[Path, Path]]) -> None:
    """Moves each (finished, target) file into place: flushed to disk first, then renamed over the target in order."""
    pairs = list(pairs)
    for finished, _ in pairs:
        _sync(finished)
    for finished, target in pairs:
        os.replace(finished, target)
    for folder in {target.parent for _, target in pairs}:
        _sync(folder)


def write_adapter(directory: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes an adapter directory; a reader finds each file either as it was or as it will be, never in between.

    Args:
        directory: created when missing; other files in it are left alone.
        config: contents of `adapter_config.json`.
        tensors: contents of `adapter_model.safetensors`, on any device.
    """
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"directory must be a directory, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    suffix = f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    weights, settings = folder / f".{WEIGHTS_NAME}{suffix}", folder / f".{CONFIG_NAME}{suffix}"
    try:
        save_file(_separate(tensors), weights, metadata={"format": "pt"})
        settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        install([(weights, folder / WEIGHTS_NAME), (settings, folder / CONFIG_NAME)])
    finally:
        for leftover in (weights, settings):
            with suppress(FileNotFoundError):
                leftover.unlink()


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, none sharing memory with another: what safetensors can hold."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        storage = plain.untyped_storage().data_ptr()
        result[key] = plain.clone() if storage in seen else plain
        seen.add(storage)
    return result


def read_adapter(directory: str | os.PathLike[str]) -> AdapterFiles:
    """Reads an adapter directory; never unpickles.

    Raises:
        FileNotFoundError: the directory or one of its two files is missing.
        ValueError: a file is damaged.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"directory must be a local adapter directory, but {folder} does not exist")
    settings, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not weights.exists() and (folder / "adapter_model.bin").exists():
        raise FileNotFoundError(
            f"{folder} holds its weights as a pickle (adapter_model.bin), which can run code and is never read; "
            "load and save the adapter with PEFT to get safetensors"
        )
    for path in (settings, weights):
        if not path.exists():
            raise FileNotFoundError(f"{folder} is not an adapter directory: it has no {path.name}")
    try:
        config = json.loads(settings.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{settings} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{settings} must hold a JSON object, got {type(config).__name__}")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a whole safetensors file: {error}") from error
    return AdapterFiles(folder, config, without_wrapper_copies(tensors))


def without_wrapper_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the second and third copy of a bias that PEFT writes for modules_to_save with bias="all".

    `X.modules_to_save.bias` repeats `X.bias`, and `X.original_module.bias` is the frozen base model's.
    """
    copies = {
        key
        for key in tensors
        for wrapper in (".modules_to_save.", ".original_module.")
        if wrapper in key and key.replace(wrapper, ".") in tensors
    }
    return {key: tensor for key, tensor in tensors.items() if key not in copies}


def check_tensors(files: AdapterFiles, expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the file holds exactly the expected keys, shapes, floating dtypes and finite numbers."""
    missing, unexpected = sorted(expected.keys() - files.tensors.keys()), sorted(files.tensors.keys() - expected.keys())
    if missing or unexpected:
        parts = [f"{_some(keys)} {verb}" for keys, verb in ((missing, "missing"), (unexpected, "unexpected")) if keys]
        raise ValueError(f"the adapter in {files.directory} does not fit the model: {'; '.join(parts)}")
    for key, tensor in files.tensors.items():
        wanted = expected[key]
        if tensor.shape != wanted.shape:
            raise ValueError(
                f"the adapter in {files.directory} does not fit the model: {key} must be {list(wanted.shape)}, "
                f"got {list(tensor.shape)}"
            )
        if tensor.dtype.is_floating_point != wanted.dtype.is_floating_point:
            raise ValueError(f"{key} in {files.directory} must be like {wanted.dtype}, got {tensor.dtype}")
    check_finite(files)


def check_finite(files: AdapterFiles) -> None:
    """Raises ValueError where a tensor of the file holds NaN or infinity."""
    for key, tensor in files.tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{key} in {files.directory} holds NaN or infinity")


def check_holds_only(files: AdapterFiles, keys: Iterable[str], what: str) -> None:
    """Raises ValueError where the file has tensors besides those at `keys`, which are `what`."""
    others = sorted(files.tensors.keys() - set(keys))
    if others:
        raise ValueError(f"the adapter in {files.directory} holds more than {what}: {_some(others)}")


def _some(keys: list[str], limit: int = 3) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
