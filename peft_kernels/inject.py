"""Adapters on a whole model: `inject` and its inverse `eject`, `merge` and `unmerge`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from . import targets
from .config import LoraConfig
from .nn.lora import LoRALinear
from .planning import STATE, Plan, injection_of, lora_layers, paths_of, plan_injection, shortened, unwrapped
from .reports import InjectionReport


def inject(
    model: nn.Module,
    config: LoraConfig,
    *,
    seed: int | None = None,
    autocast_adapter_dtype: bool = True,
) -> InjectionReport:
    """Replaces the linear layers that `config` names by `nn.LoRALinear`, in place, and freezes everything else.

    Weights are shared, not copied. What trains afterwards: the factors, the biases that `config.bias` says, and the
    modules in `config.modules_to_save` (in place; unlike PEFT no second copy is kept). A parameter shared between such
    a module and another one is copied first, so that the other one stays frozen; the report notes it. A linear layer
    whose weight is tied to another module's may be adapted: the weight stays tied and frozen. A model that is already
    gradient checkpointing gets `enable_input_require_grads()`, as PEFT does; call it yourself when you switch
    reentrant checkpointing on later.

    Args:
        model: any module; call before `torch.compile`, DistributedDataParallel and `fully_shard`.
        config: a `LoraConfig`, or PEFT's own.
        seed: draws the initial factors from this seed, leaving torch's generators alone; None draws from torch's
            default CPU generator.
        autocast_adapter_dtype: True keeps the factors in float32 over a bfloat16 or float16 model (PEFT's default);
            False gives them the base weight's dtype.

    Returns:
        Layer by layer what was replaced and what was left alone, and why.

    Raises:
        ValueError, TypeError: nothing matches (the message lists what could), a named module cannot be replaced, the
            model has adapters already, or an option is not supported. The model is then as it was.
    """
    return commit(model, plan_injection(model, config, seed, autocast_adapter_dtype))


def commit(model: nn.Module, plan: Plan) -> InjectionReport:
    """Carries a plan out."""
    config = plan.injection.config
    notes = list(plan.notes)
    model.requires_grad_(False)
    for path, layer in plan.layers.items():
        for place in plan.places[path]:
            _put(model, place, layer)
    for owner, name, parameter in plan.untied:
        setattr(owner, name, parameter)
    setattr(model, STATE, plan.injection)
    if not config.inference_mode:
        for parameter in _trained_with_factors(model, plan):
            parameter.requires_grad_(True)
    else:
        for layer in plan.layers.values():
            layer.lora_a.requires_grad_(False)
            layer.lora_b.requires_grad_(False)
    require_input_grads: Any = getattr(model, "enable_input_require_grads", None)
    if require_input_grads is not None and _checkpoints_activations(model):
        require_input_grads()
        notes.append("the model checkpoints activations, so its input embeddings now require gradients")
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return InjectionReport(
        plan.rows,
        notes=tuple(notes),
        trainable_parameters=sum(number for number, trains in counts if trains),
        all_parameters=sum(number for number, _ in counts),
    )


def _checkpoints_activations(model: nn.Module) -> bool:
    """Whether a transformers model does; the second name is the one of transformers before 5.20."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return bool(next((value for name in names if (value := getattr(model, name, None)) is not None), False))


def _trained_with_factors(model: nn.Module, plan: Plan) -> Iterator[nn.Parameter]:
    """What trains besides the factors."""
    bias = plan.injection.config.bias
    if bias == "lora_only":
        yield from (layer.bias for layer in plan.layers.values() if layer.bias is not None)
    elif bias == "all":
        for name, parameter in model.named_parameters():
            if targets.ends_in(name, "bias"):
                yield parameter
    for module in plan.saved.values():
        yield from (parameter for parameter in module.parameters() if parameter.is_floating_point())


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def eject(model: nn.Module, merge: bool = True) -> None:
    """Puts an `nn.Linear` back in the place of every `LoRALinear`, and undoes what `inject` froze.

    Biases and modules_to_save that were trained keep their trained values.

    Args:
        model: a model with `LoRALinear` layers.
        merge: True leaves the update in the weights (a new weight tensor per layer, rounded once; where it was tied
            to another module's, that tie ends, with a warning). False drops the update; the weights are the original
            ones, to the bit.

    Raises:
        ValueError: the model has no `LoRALinear`.
    """
    model = unwrapped(model)
    layers = _present(model)
    if "" in layers:
        raise ValueError("model is itself a LoRALinear; use its to_linear(merge)")
    places = paths_of(dict(model.named_modules(remove_duplicate=False)))
    tied = _tied_weights(model, layers) if merge else []
    for layer in layers.values():
        # One layer at a time, so that merging needs the memory of one weight and not of all.
        linear = layer.to_linear(merge)
        for place in places[id(layer)]:
            _put(model, place, linear)
    injection = injection_of(model)
    if injection is not None:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name in injection.trainable_before)
        delattr(model, STATE)
    if tied:
        warnings.warn(f"merged weights are no longer tied to other modules': {shortened(tied, ', ')}", stacklevel=2)


def _tied_weights(model: nn.Module, layers: dict[str, LoRALinear]) -> list[str]:
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(id(module))
    return [path for path, layer in layers.items() if len(owners[id(layer.weight)]) > 1]


def _present(model: nn.Module) -> dict[str, LoRALinear]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError(
            "model has no LoRALinear layers; for PEFT's own layers use PEFT's merge_adapter, unmerge_adapter, "
            "merge_and_unload"
        )
    return layers


def merge(model: nn.Module) -> None:
    """Merges every `LoRALinear` of the model: it then computes with one matrix per layer and no adapter.

    Raises:
        ValueError: the model has no `LoRALinear`.
    """
    layers = [layer for layer in _present(model).values() if not layer.merged]
    if not layers:
        warnings.warn("all adapters are merged already; nothing to do", stacklevel=2)
    for layer in layers:
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undoes `merge`, to the bit.

    Raises:
        ValueError: the model has no `LoRALinear`.
    """
    layers = [layer for layer in _present(model).values() if layer.merged]
    if not layers:
        warnings.warn("no adapter is merged; nothing to do", stacklevel=2)
    for layer in layers:
        layer.unmerge()
