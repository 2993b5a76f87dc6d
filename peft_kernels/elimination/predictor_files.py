"""Predictors on disk: `predictor_config.json` and `predictor_model.safetensors`, written whole, read warily."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapter_files import install
from .predictor import BlockPredictor, Predictors, check_count, parameter_shapes

CONFIG_NAME = "predictor_config.json"
WEIGHTS_NAME = "predictor_model.safetensors"
KIND = "TOKEN_ELIMINATION_PREDICTORS"


def _key(index: int, name: str) -> str:
    return f"layers.{index}.{name}"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file beside `path`, for `install` to move into place."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """The JSON object of a file whose "kind" is `kind`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict) or values.get("kind") != kind:
        raise ValueError(f"{path} must hold a JSON object of kind {kind!r}")
    return values


def write(predictors: Predictors, directory: str | os.PathLike[str]) -> None:
    """Writes predictors; a reader finds each file either as it was or as it will be, never in between.

    Args:
        predictors: on any device.
        directory: created when missing; other files in it are left alone.

    Raises:
        NotADirectoryError: it is a file.
    """
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"directory must be a directory, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for index, predictor in predictors.items():
        for name, tensor in predictor.state_dict().items():
            tensors[_key(index, name)] = tensor.detach().cpu().contiguous().clone()
    config = {
        "kind": KIND,
        "base_model_name_or_path": predictors.base_model,
        "block_size": predictors.block_size,
        "hidden_size": predictors.hidden_size,
        "layers": {str(index): {"rank": p.rank, "size": p.size} for index, p in predictors.items()},
    }
    suffix = f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    weights, settings = folder / f".{WEIGHTS_NAME}{suffix}", folder / f".{CONFIG_NAME}{suffix}"
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
        write_json(settings, config)
        install([(weights, folder / WEIGHTS_NAME), (settings, folder / CONFIG_NAME)])
    finally:
        for leftover in (weights, settings):
            with suppress(FileNotFoundError):
                leftover.unlink()


def read(directory: str | os.PathLike[str]) -> Predictors:
    """Reads what `write` wrote, onto the CPU; never unpickles.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError, TypeError: a file is damaged, or the two do not go together.
    """
    folder = Path(directory)
    path = folder / CONFIG_NAME
    values = read_json(path, KIND)
    if not (folder / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_NAME}")
    try:
        tensors = load_file(folder / WEIGHTS_NAME)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_NAME} is not a whole safetensors file: {error}") from error
    base, layers = values.get("base_model_name_or_path"), values.get("layers")
    if not isinstance(layers, dict) or not layers or not (base is None or isinstance(base, str)):
        raise ValueError(f"{path} must name its layers, each with rank and size")
    block_size, hidden_size = values.get("block_size"), values.get("hidden_size")
    expected: dict[str, tuple[int, ...]] = {}
    for key, sizes in layers.items():
        if not key.isdecimal() or not isinstance(sizes, dict):
            raise ValueError(f"{path} must name its layers by index, each with rank and size, got {key!r}: {sizes!r}")
        numbers = {**sizes, "block_size": block_size, "hidden_size": hidden_size}
        for name in ("rank", "size", "block_size", "hidden_size"):
            check_count(f"{path}: {name}", numbers.get(name))
        shapes = parameter_shapes(numbers["hidden_size"], numbers["rank"], numbers["size"])
        expected.update({_key(int(key), name): shape for name, shape in shapes.items()})
    _check(folder / WEIGHTS_NAME, tensors, expected)  # before anything of these sizes is made
    found = {}
    for key, sizes in layers.items():
        index = int(key)
        predictor = BlockPredictor(hidden_size, sizes["rank"], sizes["size"], block_size, torch.Generator())  # type: ignore[arg-type]
        predictor.load_state_dict({name: tensors[_key(index, name)] for name in predictor.state_dict()})
        found[index] = predictor.requires_grad_(False)
    return Predictors(found, base)


def _check(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    wrong = sorted(tensors.keys() ^ expected.keys())
    if wrong:
        raise ValueError(f"{path} does not go with its configuration: {wrong[0]} is missing or not expected")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key] or tensor.dtype != torch.float32:
            raise ValueError(
                f"{path}: {key} must be float32 {list(expected[key])}, got {tensor.dtype} {list(tensor.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {key} holds NaN or infinity")
