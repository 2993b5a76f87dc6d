"""What of a linear layer a drop-in can take over, and the taking over itself."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STATE_DICT_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

M = TypeVar("M", bound=nn.Module)


def type_name(module: object, kind: type | None = None) -> str:
    """`nn.Linear` for torch's own modules, else module path and class name; of `kind` instead, when given."""
    kind = kind or type(module)
    if kind.__module__.startswith("torch.nn."):
        return f"nn.{kind.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def weight_obstacle(linear: nn.Module) -> str | None:
    """Why our operators cannot use this module's `weight` as a plain matrix; None when they can."""
    if "parametrizations" in linear._modules:  # what torch.nn.utils.parametrize registers, asked the fast way
        return "its weight is parametrized"
    weight = linear._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter (weight_norm or spectral_norm compute it in a hook)"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.dtype not in FLOATING:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')} (quantized base layers are not fused)"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether something watches this module's calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def replaced_call(module: nn.Module) -> str | None:
    """Why calling this module does not run its class's `forward`; None when it does."""
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance (accelerate's device hooks do that)"
    if module.__dict__.get("_compiled_call_impl") is not None:
        return "it is compiled by itself; compile the whole model afterwards instead"
    return None


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer computes `x weight + bias` with `weight [K, N]`, as `Conv1D` of transformers does."""
    weight = layer._parameters.get("weight")
    sizes = (getattr(layer, "nx", None), getattr(layer, "nf", None))
    return not isinstance(layer, nn.Linear) and weight is not None and tuple(weight.shape) == sizes


def is_plain(layer: nn.Module | None) -> bool:
    """Whether the layer is an `nn.Linear` proper or a `Conv1D`, and nothing made of one."""
    conv1d = layer is not None and type(layer).__name__ == "Conv1D" and is_transposed(layer)
    return type(layer) is nn.Linear or conv1d


def takeover_obstacle(linear: nn.Module, transposed: bool = False) -> str | None:
    """Why a drop-in cannot take the place of this module; None when it can.

    Forward and backward hooks are no obstacle: the drop-in carries them, and their handles keep working.

    Args:
        linear: any module.
        transposed: whether the drop-in is one for `Conv1D`, and not for `nn.Linear`.
    """
    if not (is_transposed(linear) if transposed else isinstance(linear, nn.Linear)):
        return f"it is a {type_name(linear)}, not {'a Conv1D' if transposed else 'an nn.Linear'}"
    reason = weight_obstacle(linear)
    if reason is not None:
        return reason
    if not is_plain(linear):
        return f"it is a {type_name(linear)}, whose own forward would be lost"
    reason = replaced_call(linear)
    if reason is not None:
        return reason
    if linear._modules or linear._buffers or set(linear._parameters) != {"weight", "bias"}:
        return "it holds more than weight and bias"
    if any(getattr(linear, name) for name in _STATE_DICT_HOOKS):
        return "it has state_dict hooks, which are bound to it"
    return None


def take_over(source: nn.Module, kind: type[M], without: tuple[str, ...] = ()) -> M:
    """A module of class `kind` with the state of `source`: the same parameters, hooks, flags and attributes.

    The registries of parameters, buffers and submodules are copied, so neither module sees what the other registers
    later; the hook registries are shared, so a handle removes its hook from both. `source` is not changed.

    Args:
        source: the module to take over.
        kind: class of the result; its `__init__` does not run.
        without: names of parameters, buffers and attributes to leave behind.
    """
    module = object.__new__(kind)
    state = {name: value for name, value in source.__dict__.items() if name not in without}
    for registry in ("_parameters", "_buffers", "_modules"):
        state[registry] = {name: value for name, value in state[registry].items() if name not in without}
    state["_non_persistent_buffers_set"] = set(state["_non_persistent_buffers_set"]) - set(without)
    module.__dict__.update(state)
    return module
