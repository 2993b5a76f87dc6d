"""`accelerate`: the layers of a PEFT model computed by our kernels, in place, one instance at a time.

PEFT's `lora.Linear` computes `base_layer(x) + lora_B(lora_A(dropout(x))) * scaling` as separate operations. An
accelerated instance has its `__class__` set to `AcceleratedLinear`, a subclass that computes the same in one fused
operator whenever nothing forbids it, and calls PEFT's own forward otherwise. Modules, parameters and their names stay
PEFT's, so that saving, merging, switching and disabling adapters, copying and pickling work as before.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import ops
from ..nn.linear import replaced_call, type_name, weight_obstacle
from ..nn.lora import LoRALinear
from ..reference import lora as reference
from ..reports import AccelerationReport, LayerReport

_RELIED_ON = (
    "base_layer",
    "lora_A",
    "lora_B",
    "lora_dropout",
    "scaling",
    "lora_variant",
    "lora_bias",
    "fan_in_fan_out",
    "active_adapters",
    "disable_adapters",
    "merged",
)
"""Attributes of PEFT's `lora.Linear` that decide what it computes."""


class PeftIncompatible(RuntimeError):
    """The installed PEFT is not built the way `accelerate` relies on; the message names what differs."""


class AcceleratedLinear(Linear):  # type: ignore[misc]
    """PEFT's `lora.Linear`, fused while it can be; instances are made by `accelerate`, never by a constructor."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x `[..., K]` to `[..., N]`, as PEFT's forward; arguments beyond x go to PEFT."""
        if args or kwargs or present_obstacle(self) is not None:
            return super().forward(x, *args, **kwargs)
        name = active_here(self)[0]
        base, lora_a, lora_b, dropout = _parts(self, name)
        if input_obstacle(x, base.weight, lora_a.weight) is not None:
            return super().forward(x)
        return ops.lora_linear(
            x,
            base.weight,
            base.bias,
            lora_a.weight,
            lora_b.weight,
            self.scaling[name],
            dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
            dropout.training,
        )


def active_here(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    present = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in present]


def _parts(layer: Any, name: str) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Module]:
    """Base layer, lora_A, lora_B and dropout of one adapter; through the registries, which attributes would search."""
    modules = layer._modules
    return (
        modules["base_layer"],
        modules["lora_A"]._modules[name],
        modules["lora_B"]._modules[name],
        modules["lora_dropout"]._modules[name],
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def structural_obstacle(layer: Any) -> str | None:
    """Why this layer can never run fused as it is built; None when it can."""
    if isinstance(layer, LoRALinear):
        return None
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return "it is trained in full (modules_to_save), without an adapter to fuse"
    if type(layer) not in (Linear, AcceleratedLinear):
        return (
            f"no fused kernel for PEFT's {type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"
        )
    base = layer.base_layer
    if layer.fan_in_fan_out:
        return "its base layer stores the weight transposed (Conv1D, fan_in_fan_out)"
    if not isinstance(base, nn.Linear) or type(base).forward is not nn.Linear.forward:
        return f"its base layer is a {type_name(base)}, not an nn.Linear"
    return replaced_call(layer)


def present_obstacle(layer: Any) -> str | None:
    """Why this layer cannot run fused in its present state; None when it can. Looked at in every call."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "an adapter is merged into its weight"
    active = active_here(layer)
    if len(active) != 1:
        return f"{len(active)} adapters are active, not one"
    name = active[0]
    if name in layer.lora_variant:
        return "its adapter is a variant of LoRA (DoRA and others)"
    if layer.lora_bias.get(name):
        return "its adapter has a bias (lora_bias)"
    parts = base, lora_a, lora_b, dropout = _parts(layer, name)
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return f"its dropout is a {type_name(dropout)}"
    for part in parts:
        if _has_hooks(part):
            return "a module inside it has hooks, which a fused call would skip"
        reason = replaced_call(part)
        if reason is not None:
            return f"inside it, {reason}"
    if torch_module._has_any_global_hook():
        return "a global module hook is set, which a fused call would skip"
    for part in (base, lora_a, lora_b):
        reason = weight_obstacle(part)
        if reason is not None:
            return reason
    return None


def input_obstacle(x: Tensor, weight: Tensor, factor: Tensor) -> str | None:
    """Why the operator would not take `x`; PEFT's forward then does, or raises what it has always raised."""
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return "its input is not of the weight's dtype"
    if (factor.dtype == torch.float64) != (x.dtype == torch.float64):
        return "float64 is mixed with another dtype"
    return None


@cache
def _check_peft() -> None:
    """Raises PeftIncompatible unless PEFT's layer takes its input, and computes from it, what we take over."""
    parameters = list(inspect.signature(Linear.forward).parameters.values())
    kinds = [parameter.kind for parameter in parameters[2:]]
    if len(parameters) < 2 or kinds != [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
        raise PeftIncompatible(
            f"PEFT {peft.__version__}: lora.Linear.forward is expected to take (self, x, *args, **kwargs), "
            f"it takes {inspect.signature(Linear.forward)}"
        )
    config = peft.LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["0"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        layer: Any = peft.get_peft_model(nn.Sequential(nn.Linear(5, 4, dtype=torch.float32)), config).get_submodule(
            "base_model.model.0"
        )
        _check_attributes(layer)
        base, lora_a, lora_b, _ = _parts(layer, "default")
        x = torch.randn(3, 5, dtype=torch.float32)
        expected = reference.lora_linear(
            x, base.weight, base.bias, lora_a.weight, lora_b.weight, layer.scaling["default"]
        )
        if present_obstacle(layer) is not None or not torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-5):
            raise PeftIncompatible(f"PEFT {peft.__version__}: lora.Linear does not compute what it has computed so far")


def _check_attributes(layer: Any) -> None:
    missing = [name for name in _RELIED_ON if not hasattr(layer, name)]
    if missing:
        raise PeftIncompatible(f"PEFT {peft.__version__}: lora.Linear has no {', '.join(missing)}")


def accelerate(model: nn.Module) -> AccelerationReport:
    """Makes the LoRA layers of a PEFT model run fused, in place; `restore` undoes it.

    Nothing is copied, renamed or patched outside the model. A layer runs fused while exactly one of its adapters is
    active, enabled, unmerged and plain LoRA over a plain `nn.Linear`; in every other state, and when called with more
    than its input (`adapter_names`), it runs PEFT's own forward. Dropout keeps PEFT's place and probability and
    follows the dropout module's training flag; its masks are other ones than `torch.nn.Dropout` would draw. Factors in
    float32 over a bfloat16 or float16 base are used as they are, without casting activations to float32.

    Args:
        model: a `PeftModel`, or any module that holds PEFT layers. Calling it again is harmless and reports anew;
            call it again after adding an adapter, which may have brought new layers.

    Returns:
        Every adapter layer: fused, or left alone with the reason.

    Raises:
        ValueError: the model has no PEFT layers.
        PeftIncompatible: the installed PEFT does not look or compute as expected (checked once, on a small layer).
    """
    _check_peft()
    rows: list[LayerReport] = []
    fusible: list[Any] = []
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper | LoRALinear):
            continue
        kind = type_name(module, Linear if type(module) is AcceleratedLinear else None)
        reason = structural_obstacle(module)
        if reason is None and isinstance(module, Linear):
            fusible.append(module)
            reason = present_obstacle(module)
        rows.append(LayerReport(path, kind, reason))
    if not rows:
        raise ValueError("model has no PEFT layers; use inject(model, LoraConfig(...)) to add an adapter")
    for layer in fusible:
        layer.__class__ = AcceleratedLinear
    return AccelerationReport(tuple(rows))


def restore(model: nn.Module) -> int:
    """Gives every accelerated layer PEFT's own class back; returns how many there were."""
    layers: list[Any] = [module for module in model.modules() if type(module) is AcceleratedLinear]
    for layer in layers:
        layer.__class__ = Linear
    return len(layers)
