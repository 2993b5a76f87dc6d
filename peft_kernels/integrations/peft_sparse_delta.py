"""Which delta a SHiRA or Super-Tuning layer of PEFT's asks for now, or why our kernels cannot compute with it.

Read-only: nothing here writes into a weight. What was found out about an adapter's indices, and the weight that deltas
are written into, is kept on the layer, in an attribute that is neither copied nor saved.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from peft.tuners.shira.layer import Linear as ShiraLinear
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..nn.linear import has_hooks, replaced_call, type_name, weight_obstacle
from ..nn.merged_linear import contiguity_obstacle
from ..nn.switched import Positions, SwitchedWeight

STATE = "_peft_kernels_state"
"""Name of the layer's attribute that holds its `State`."""

_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


class State:
    """What an accelerated layer knows beside PEFT's own state.

    Attributes:
        weight: the base weight, and what it holds.
        found: per adapter the indices that were looked at, as tensor and count of changes, and what came of it: where
            its values belong, or why they cannot be used.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = SwitchedWeight(weight)
        self.found: dict[str, tuple[Any, int, Positions | str]] = {}


class LowRank(NamedTuple):
    """Factors beside a delta (Supra)."""

    lora_a: nn.Module
    lora_b: nn.Module
    dropout: nn.Module
    scaling: float


class Delta(NamedTuple):
    """What one adapter adds to the base weight: `scaling values` at positions, and perhaps a low-rank update."""

    values: Tensor
    positions: Positions
    scaling: float
    low_rank: LowRank | None


def state_of(layer: Any) -> State | None:
    """What the layer knows; None for one that is not accelerated."""
    return layer.__dict__.get(STATE)  # type: ignore[no-any-return]


def base_of(layer: Any) -> Any:
    """The base layer, found without asking the layer for it: its weight is left as it is."""
    return layer._modules["base_layer"]


def owns_weight(layer: Any) -> bool:
    """Whether the base weight is the one that deltas may be written into."""
    state = state_of(layer)
    return state is not None and state.weight.weight is base_of(layer)._parameters.get("weight")


def values_of(layer: Any) -> Any:
    """The layer's values by adapter."""
    return layer._modules[layer.adapter_layer_names[0]]._parameters


def active_here(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    present = values_of(layer)
    return [name for name in layer.active_adapters if name in present]


def structural_obstacle(layer: Any) -> str | None:
    """Why this layer can never run fused as it is built; None when it can."""
    base = base_of(layer)
    if getattr(layer, "fan_in_fan_out", False):
        return "its base layer stores the weight transposed (Conv1D, fan_in_fan_out)"
    if not isinstance(base, nn.Linear) or type(base).forward is not nn.Linear.forward:
        return f"its base layer is a {type_name(base)}, not an nn.Linear"
    return replaced_call(layer)


def present_delta(layer: Any) -> Delta | str:
    """The delta of the one active adapter, or why this layer cannot run fused as it is now. Asked in every call."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "an adapter is merged into its weight"
    active = active_here(layer)
    if len(active) != 1:
        return f"{len(active)} adapters are active, not one"
    reason = _base_obstacle(layer)
    if reason is not None:
        return reason
    name = active[0]
    positions = positions_of(layer, name)
    if isinstance(positions, str):
        return positions
    if isinstance(layer, ShiraLinear):
        return Delta(values_of(layer)[name], positions, float(layer.scaling[name]), None)
    low_rank = _low_rank(layer, name)
    if low_rank is not None:
        reason = _low_rank_obstacle(low_rank)
        if reason is not None:
            return reason
    return Delta(values_of(layer)[name], positions, 1.0, low_rank)


def _base_obstacle(layer: Any) -> str | None:
    base = base_of(layer)
    if has_hooks(base):
        return "its base layer has hooks"  # PEFT warns that it skips them
    reason = replaced_call(base)
    if reason is not None:
        return f"inside it, {reason}"
    reason = weight_obstacle(base) or contiguity_obstacle(base)
    if reason is not None:
        return reason
    if not owns_weight(layer):
        return "its weight is not the one that accelerate saw; call accelerate again"
    if base.weight.requires_grad:
        return "its base weight trains"
    if not torch.compiler.is_compiling() and _transforms_active():
        return "a torch.func transform is active, which a write into the weight would escape"
    return None


def _low_rank(layer: Any, name: str) -> LowRank | None:
    """A Supra adapter's factors; None for a Super-Tuning adapter without any."""
    r = layer.supertuning_rank[name]
    if r <= 0:
        return None
    parts = ("supertuning_lora_A", "supertuning_lora_B", "supertuning_lora_dropout")
    lora_a, lora_b, dropout = (layer._modules[part]._modules[name] for part in parts)
    return LowRank(lora_a, lora_b, dropout, layer.supertuning_lora_alpha[name] / r)


def _low_rank_obstacle(low_rank: LowRank) -> str | None:
    """Of factors and dropout, which PEFT calls as modules."""
    dropout = low_rank.dropout
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return f"its dropout is a {type_name(dropout)}"
    for part in (low_rank.lora_a, low_rank.lora_b, dropout):
        if has_hooks(part):
            return "a module inside it has hooks, which a fused call would skip"
        reason = replaced_call(part)
        if reason is not None:
            return f"inside it, {reason}"
    if torch_module._has_any_global_hook():
        return "a global module hook is set, which a fused call would skip"
    return weight_obstacle(low_rank.lora_a) or weight_obstacle(low_rank.lora_b)


def positions_of(layer: Any, name: str) -> Positions | str:
    """Where an adapter's values belong, or why they cannot be used; worked out once for each tensor of indices."""
    state = state_of(layer)
    assert state is not None
    known = state.found.get(name)
    if torch.compiler.is_compiling():  # checks cannot be traced; start() has made them
        return "its indices were not looked at yet; call accelerate again" if known is None else known[2]
    if isinstance(layer, ShiraLinear):
        indices = layer.shira_indices.get(name)
    else:
        indices = layer._modules["supertuning_indices"]._buffers.get(name)
    if indices is None:
        return "its adapter has no indices"
    if known is not None and known[0]() is indices and known[1] == changes_of(indices) >= 0:
        return known[2]
    found = _positions(indices, base_of(layer).weight, values_of(layer)[name])
    state.found[name] = (weakref.ref(indices), changes_of(indices), found)
    return found


def changes_of(tensor: Tensor) -> int:
    """How often the tensor was changed in place; -1 where torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def indices_obstacle(layer: Any, name: str, indices: Tensor) -> str | None:
    """Why `indices`, read from a file, cannot take the place of an adapter's; None when they can."""
    found = _positions(indices, base_of(layer).weight, values_of(layer)[name])
    return found if isinstance(found, str) else None


def _positions(indices: Tensor, weight: Tensor, values: Tensor) -> Positions | str:
    if indices.is_meta or values.is_meta or weight.is_meta:
        return "its adapter is on the meta device"
    if values.device != weight.device:
        return f"its values are on {values.device}, its weight on {weight.device}"
    flat = indices.to(weight.device)
    if indices.dim() == 2:  # SHiRA's rows and columns
        rows, columns = flat.to(torch.int64)
        inside = (rows >= 0) & (rows < weight.shape[0]) & (columns >= 0) & (columns < weight.shape[1])
        if not bool(inside.all()):
            return f"its indices are not all inside the weight, {list(weight.shape)}"
        flat = rows * weight.shape[1] + columns
    if flat.shape != values.shape:
        return f"it has {values.numel()} values at {flat.numel()} indices"
    try:
        return Positions.of(flat, weight.numel())
    except (TypeError, ValueError) as error:
        return f"its {error}"
