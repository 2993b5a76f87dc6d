"""Slices as LoRA and back: a slice of s channels is a product of rank s with a matrix that selects them."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from .. import targets
from ..adapter_files import KEY_PREFIX, check_finite, check_holds_only, read_adapter, write_adapter
from ..channels.slices import Slice
from ..config import LoraConfig
from .adapter import SliceAdapter, SliceUpdate


def to_lora(adapter: SliceAdapter, directory: str | os.PathLike[str]) -> None:
    """Writes the adapter as LoRA, in a directory that PEFT and `load_adapter` read; it computes the same function.

    Input channels: lora_A selects them and lora_B is the change. Output channels: lora_A is the change and lora_B
    selects. Ranks are the layers' numbers of channels, and scaling is 1. Slices are smaller than that: half of the
    numbers in the file are zeros. Over transformers' `Conv1D` the factors are the same; PEFT sets `fan_in_fan_out` for
    such a layer by itself and says so in a warning.

    Raises:
        ValueError: the adapter changes nothing.
    """
    filled = {path: update for path, update in adapter.items() if update.slice.indices.numel()}
    if not filled:
        raise ValueError("adapter must change a channel at least")
    ranks = {path: update.slice.indices.numel() for path, update in filled.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != r}
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules="|".join(re.escape(path) for path in sorted(filled)),  # these paths, not others that end in one
        rank_pattern=others,
        alpha_pattern=others,
        base_model_name_or_path=adapter.base_model,
        inference_mode=True,
    )
    tensors: dict[str, Tensor] = {}
    for path, update in filled.items():
        change, selector = update.change.detach().cpu(), _selector(update)
        lora_a, lora_b = (selector, change) if update.axis == 1 else (change, selector.t())
        tensors[f"{KEY_PREFIX}{path}.lora_A.weight"] = lora_a
        tensors[f"{KEY_PREFIX}{path}.lora_B.weight"] = lora_b
    write_adapter(directory, config.to_dict(), tensors)


def _selector(update: SliceUpdate) -> Tensor:
    """`[s, channels]`: a one in each row, in the column of the channel that it selects."""
    indices = update.slice.indices
    rows = torch.zeros(indices.numel(), update.shape[update.axis], dtype=update.change.dtype)
    return rows.scatter_(1, indices[:, None], 1.0)


def from_lora(directory: str | os.PathLike[str]) -> SliceAdapter:
    """The slices of a LoRA adapter of which one factor of every layer selects channels, as `to_lora` writes them.

    Scaling goes into the change, a factor that selects with other numbers than 1 as well. `fan_in_fan_out`, which says
    how the base model keeps its weights, does not matter to factors.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, is not plain LoRA, holds more, such as biases that were trained beside it, or has
            a layer neither of whose factors selects channels.
    """
    files = read_adapter(directory)
    config = LoraConfig.from_dict({**files.config, "fan_in_fan_out": False})
    ending = ".lora_A.weight"
    check_finite(files)
    updates = {}
    for key in sorted(files.tensors):
        if not key.startswith(KEY_PREFIX) or not key.endswith(ending):
            continue
        path = key.removeprefix(KEY_PREFIX).removesuffix(ending)
        lora_a, lora_b = files.tensors[key], files.tensors.get(f"{KEY_PREFIX}{path}.lora_B.weight")
        if lora_b is None or lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != lora_b.shape[1]:
            raise ValueError(f"{path} in {files.directory}: its factors do not fit each other")
        if not (lora_a.is_floating_point() and lora_b.is_floating_point()):
            raise ValueError(f"{path} in {files.directory}: its factors are {lora_a.dtype} and {lora_b.dtype}")
        r = targets.pattern_value(config.rank_pattern, path, config.r)
        if r != lora_a.shape[0]:
            raise ValueError(f"{path} in {files.directory}: its factors have rank {lora_a.shape[0]}, expected {r:g}")
        alpha = targets.pattern_value(config.alpha_pattern, path, config.lora_alpha)
        scaling = config.options(r=int(r), lora_alpha=alpha).scaling
        updates[path] = _slices(path, lora_a, lora_b, scaling)
    if not updates:
        raise ValueError(f"the adapter in {files.directory} has no LoRA factors")
    keys = [f"{KEY_PREFIX}{path}.{name}.weight" for path in updates for name in ("lora_A", "lora_B")]
    check_holds_only(files, keys, "plain LoRA of linear layers")
    return SliceAdapter(updates, config.base_model_name_or_path)


def _slices(path: str, lora_a: Tensor, lora_b: Tensor, scaling: float) -> SliceUpdate:
    shape = (lora_b.shape[0], lora_a.shape[1])
    dtype = torch.promote_types(lora_a.dtype, lora_b.dtype)
    for dim, selector, change in (("input", lora_a, lora_b.t()), ("output", lora_b.t(), lora_a)):
        nonzero = selector != 0
        if not bool((nonzero.sum(dim=1) == 1).all()):
            continue
        numbers, places = selector.sum(dim=1, keepdim=True), nonzero.int().argmax(dim=1)
        rows = change.to(dtype) * (numbers.to(dtype) * scaling)
        indices, into = places.unique(return_inverse=True)
        total = torch.zeros(indices.numel(), rows.shape[1], dtype=dtype).index_add_(0, into, rows)
        kept: Any = dim
        return SliceUpdate(Slice(indices, kept), (total.t() if dim == "input" else total).contiguous(), shape)
    raise ValueError(f"{path}: neither lora_A selects input channels nor lora_B output channels; it is no slice")
