"""`accelerate`: the layers of a PEFT model computed by our kernels, in place, one instance at a time.

LoRA's layers are here, those of SHiRA and Super-Tuning in `peft_sparse.py`.

PEFT's `lora.Linear` computes `base_layer(x) + lora_B(lora_A(dropout(x))) * scaling` as separate operations. An
accelerated instance has its `__class__` set to `AcceleratedLinear`, a subclass that computes the same in one fused
operator whenever nothing forbids it, and calls PEFT's own forward otherwise. Modules, parameters and their names stay
PEFT's, so that saving, merging, switching and disabling adapters, copying and pickling work as before.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
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
from ..nn.linear import has_hooks, replaced_call, type_name, weight_obstacle
from ..nn.lora import LoRALinear
from ..reference import lora as reference
from ..reports import AccelerationReport, LayerReport
from . import peft_sparse, peft_sparse_delta
from .peft_layers import PeftIncompatible, input_obstacle
from .tied import tied_weights

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
        if has_hooks(part):
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
    """Makes the LoRA, SHiRA and Super-Tuning layers of a PEFT model run fused, in place; `restore` undoes it.

    Nothing is copied, renamed or patched outside the model. A layer runs fused while exactly one of its adapters is
    active, enabled and unmerged over a plain `nn.Linear`, and is plain LoRA, SHiRA, Super-Tuning or Supra; in every
    other state, and when called with more than its input (`adapter_names`), it runs PEFT's own forward. Dropout keeps
    PEFT's place and probability and follows the dropout module's training flag; its masks are other ones than
    `torch.nn.Dropout` would draw. Factors in float32 over a bfloat16 or float16 base are used as they are, without
    casting activations to float32.

    SHiRA and Super-Tuning: while such a layer is in use its base weight holds `original + values`, rounded once to the
    weight's dtype (at least as accurate as PEFT, which rounds Super-Tuning's values before the sum as well). It is
    written again after values have changed or got a gradient, and has its original bits for `layer.base_layer`, all of
    PEFT's methods, state_dict, copies and pickles, and after `restore`. Do not change it by hand through a reference
    taken earlier, and copy a state_dict that is to outlive the next call: its tensors are the layer's own. A weight
    that any other module of `model` shares is left alone. Adapters may be switched, disabled and enabled between
    forward and backward, but not merged; in a compiled model not even that (autograd raises). `optim.SparseAdamW`
    writes SHiRA's values back in the step that changes them.

    Args:
        model: a `PeftModel`, or any module that holds PEFT layers. Calling it again is harmless and reports anew;
            call it again after adding an adapter, which may have brought new layers, and after anything that has put
            other tensors in the place of base weights.

    Returns:
        Every adapter layer: fused, or left alone with the reason.

    Raises:
        ValueError: the model has no PEFT layers.
        PeftIncompatible: the installed PEFT does not look or compute as expected (checked once, on a small layer).
    """
    _check_peft()
    rows: list[LayerReport] = []
    fusible: list[Any] = []
    sparse: list[tuple[str, Any]] = []
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper | LoRALinear):
            continue
        theirs = peft_sparse.peft_class(module)
        if theirs is not None:
            sparse.append((path, module))
            rows.append(LayerReport(path, type_name(module, theirs)))
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
    if sparse:
        reasons = _accelerate_sparse(model, sparse)
        rows = [replace(row, reason=reasons.get(row.path, row.reason)) for row in rows]
    return AccelerationReport(tuple(rows))


def _accelerate_sparse(model: nn.Module, layers: list[tuple[str, Any]]) -> dict[str, str | None]:
    """Gives SHiRA and Super-Tuning layers our classes where that can be; by path, why they do not run fused now."""
    peft_sparse.check_peft()
    tied = tied_weights(model)
    reasons: dict[str, str | None] = {}
    for path, layer in layers:
        reason = peft_sparse_delta.structural_obstacle(layer)
        if reason is None and (others := tied(f"{path}.base_layer.weight")):
            reason = f"its base weight is tied to {', '.join(others)}"
        if reason is None:
            peft_sparse.start(layer)
            found = peft_sparse_delta.present_delta(layer)
            reason = found if isinstance(found, str) else None
        else:
            peft_sparse.stop(layer)
        reasons[path] = reason
    return reasons


def restore(model: nn.Module) -> int:
    """Gives every accelerated layer PEFT's own class back, and its weight the original bits; returns how many."""
    layers: list[Any] = [module for module in model.modules() if type(module) is AcceleratedLinear]
    for layer in layers:
        layer.__class__ = Linear
    sparse = [module for module in model.modules() if isinstance(module, peft_sparse.SparseLayer)]
    for layer in sparse:
        peft_sparse.stop(layer)
    return len(layers) + len(sparse)
