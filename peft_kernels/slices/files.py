"""Adapters read from what `save_adapter` wrote, beside the base model whose slices they were trained from."""

from __future__ import annotations

import os
import warnings

import torch
from torch import nn

from ..adapter_files import KEY_PREFIX, check_finite, check_holds_only, read_adapter
from ..channels.layers import sizes_of, weight_of
from ..channels.slices import Slice
from ..families.s2ft import INDICES, S2FT, TRAINABLE
from ..planning import base_name, unwrapped
from .adapter import SliceAdapter, SliceUpdate, plain_layers


@torch.no_grad()
def read(directory: str | os.PathLike[str], model: nn.Module) -> SliceAdapter:
    """The adapter in a directory that `save_adapter` wrote for a model with layers of S2FT.

    A file holds the trained slices themselves; what they change is their difference to the base model's.

    Args:
        directory: a local adapter directory; pickles are never read.
        model: the base model, with plain layers. It is not changed.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, of another family, holds more than slices, such as biases that were trained
            beside them, or does not fit the model.
    """
    files = read_adapter(directory)
    config = S2FT.config_type.from_dict(files.config)
    here, there = base_name(unwrapped(model)), config.base_model_name_or_path
    if here and there and here != there:
        warnings.warn(
            f"the adapter was trained on {there!r}, this model is {here!r}: what it changes is not what was trained",
            stacklevel=2,
        )
    parts: dict[str, Slice] = S2FT.positions_in(files)
    if not parts:
        raise ValueError(f"the adapter in {files.directory} holds no slices")
    keys = [f"{KEY_PREFIX}{path}.{name}" for path, part in parts.items() for name in (TRAINABLE, INDICES[part.dim])]
    check_holds_only(files, keys, "slices")
    check_finite(files)
    for path in parts:
        if f"{KEY_PREFIX}{path}.{TRAINABLE}" not in files.tensors:
            raise ValueError(f"the adapter in {files.directory} has channels of {path}, but no slice of it")
    updates = {}
    for path, layer in plain_layers(model, parts).items():
        part, trained, shape = parts[path], files.tensors[f"{KEY_PREFIX}{path}.{TRAINABLE}"], sizes_of(layer)
        try:
            update = SliceUpdate(part, trained, shape)
        except ValueError as error:
            raise ValueError(f"{path} in {files.directory}: {error}") from None
        original = weight_of(layer).cpu().index_select(update.axis, part.indices)
        updates[path] = SliceUpdate(part, trained - original.to(trained.dtype), shape)
    return SliceAdapter(updates, config.base_model_name_or_path)
