"""The state of a `Reselector` between two steps: what it holds, and whether it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops

if TYPE_CHECKING:
    from .reselector import Reselector

FORMAT = 1
_WINDOW = {"candidates", "total", "total_squares"}


def state_of(reselector: Reselector) -> dict[str, Any]:
    """See `Reselector.state_dict`."""
    tensors = {"generator": reselector.generator.get_state()}
    for path, layer in reselector.layers.items():
        tensors[f"{path}/indices"] = layer.indices.clone()
    windows = reselector._windows
    for path, window in windows.items():
        tensors.update({f"{path}/{name}": tensor.clone() for name, tensor in window.tensors().items()})
    return {
        "format": FORMAT,
        **_kind(reselector),
        "completed_steps": reselector.completed_steps,
        "window_steps": {path: window.steps for path, window in windows.items()} if reselector._watching else None,
        "tensors": tensors,
    }


def _kind(reselector: Reselector) -> dict[str, Any]:
    """What has to be the same for a state to make sense."""
    timetable = reselector.timetable
    return {
        "selection": reselector.selection,
        "reselection_steps": timetable.reselection_steps,
        "selection_accumulation_steps": timetable.selection_accumulation_steps,
    }


def check_state(reselector: Reselector, state: dict[str, Any]) -> None:
    """Raises ValueError unless `state` fits."""
    missing = {"format", *_kind(reselector), "completed_steps", "window_steps", "tensors"} - state.keys()
    if missing:
        raise ValueError(f"state must be a Reselector's state_dict, but has no {sorted(missing)[0]}")
    if state["format"] != FORMAT:
        raise ValueError(f"state must have format {FORMAT}, got {state['format']!r}")
    for name, value in _kind(reselector).items():
        if state[name] != value:
            raise ValueError(f"state must be of a Reselector with {name}={value!r}, got {state[name]!r}")
    layers, tensors = reselector.layers, state["tensors"]
    paths = {name.removesuffix("/indices") for name in tensors if name.endswith("/indices")}
    if paths != layers.keys():
        raise ValueError(f"state must be of the layers {sorted(layers)}, got {sorted(paths)}")
    for path, layer in layers.items():
        if not torch.equal(tensors[f"{path}/indices"].to(layer.indices.device), layer.indices):
            raise ValueError(f"state was saved with other positions of layer {path!r}; load the model's state first")
        found = window_tensors(tensors, path)
        if not found:
            continue
        if found.keys() != _WINDOW or len({tensor.shape for tensor in found.values()}) != 1:
            raise ValueError(f"state must hold {sorted(_WINDOW)} of layer {path!r}, of one shape, got {sorted(found)}")
        ops.check_indices(found["candidates"], layer.weight.numel())


def window_tensors(tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Those of a layer's window by name; empty when nothing had been counted in it."""
    return {name: tensors[f"{path}/{name}"] for name in sorted(_WINDOW) if f"{path}/{name}" in tensors}
