"""Adapters on a whole model: `inject` and its inverse `eject`, `merge` and `unmerge`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, overload

import torch
from torch import nn

from . import elimination, targets, wta_crs
from .config import AdapterConfig, TokenEliminationConfig, TokenTuneConfig, WTACRSConfig
from .families import AdapterLayer, Choices, adapter_layers
from .nn.swiglu_mlp import SwiGLUMLP
from .planning import (
    STATE,
    Plan,
    injection_of,
    memory_of,
    paths_of,
    plan_injection,
    put_module,
    shortened,
    unwrapped,
    weight_owners,
)
from .reports import EliminationReport, InjectionReport, SamplingReport, TokenTuneReport


@overload
def inject(model: nn.Module, config: TokenEliminationConfig) -> EliminationReport: ...


@overload
def inject(model: nn.Module, config: TokenTuneConfig) -> TokenTuneReport: ...


@overload
def inject(model: nn.Module, config: WTACRSConfig) -> SamplingReport: ...


@overload
def inject(
    model: nn.Module,
    config: AdapterConfig,
    *,
    seed: int | None = None,
    autocast_adapter_dtype: bool = True,
    positions: Mapping[str, Any] | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> InjectionReport: ...


def inject(
    model: nn.Module,
    config: AdapterConfig | TokenEliminationConfig | TokenTuneConfig | WTACRSConfig,
    *,
    seed: int | None = None,
    autocast_adapter_dtype: bool = True,
    positions: Mapping[str, Any] | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> InjectionReport | EliminationReport | TokenTuneReport | SamplingReport:
    """Replaces the linear layers that `config` names by the family's drop-in, in place; freezes everything else.

    A `TokenEliminationConfig` is for decoder layers instead, and freezes nothing: see `elimination.eliminate`; so is a
    `TokenTuneConfig`, see `elimination.tune`. One of the two goes with each of the others, injected before or after. A
    `WTACRSConfig` has layers keep a sample of their input for the weight gradient, and freezes nothing either: see
    `wta_crs.sample`. It goes onto LoRA, or onto layers that train.

    `LoraConfig` makes `nn.LoRALinear` layers, `SparseDeltaConfig` `nn.SparseDeltaLinear`, `S2FTConfig`
    `nn.S2FTLinear`, and `nn.S2FTConv1D` in the place of transformers' `Conv1D`, which the others refuse. Weights are
    shared, not copied. What trains afterwards: the adapters, the biases that `config.bias` says, and the modules in
    `config.modules_to_save` (in place; unlike PEFT no second copy is kept). A parameter shared between such a module
    and another one is copied first, so that the other one stays frozen; the report notes it. A linear layer whose
    weight is tied to another module's may get LoRA, which leaves the weight as it is; the others it may not. A model
    that is already gradient checkpointing gets `enable_input_require_grads()`, as PEFT does; call it yourself when you
    switch reentrant checkpointing on later.

    Args:
        model: any module; call before `torch.compile`, DistributedDataParallel and `fully_shard`.
        config: a `LoraConfig`, a `SparseDeltaConfig` or an `S2FTConfig`, or PEFT's `LoraConfig`; or a
            `TokenEliminationConfig`, `TokenTuneConfig` or `WTACRSConfig`, with which none of the other arguments go.
        seed: draws the initial factors or positions from this seed, leaving torch's generators alone; None draws from
            torch's default CPU generator.
        autocast_adapter_dtype: True keeps what trains in float32 over a bfloat16 or float16 model (PEFT's default);
            False gives it the base weight's dtype.
        positions: for sparse deltas, which entries of each weight train, instead of those that the configuration
            would choose: sorted, unique flat positions (int32 or int64) by path, for every adapted layer. For S2FT
            `channels.Slice` objects by path, for the layers that are to train.
        calibration: batches, as keyword arguments of the model, for an `S2FTConfig` that selects by activations or
            gradients; gone through once, one at a time.

    Returns:
        Layer by layer what was replaced and what was left alone, and why.

    Raises:
        ValueError, TypeError: nothing matches (the message lists what could), a named module cannot be replaced, the
            model has adapters already, or an option is not supported. The model is then as it was.
    """
    if isinstance(config, TokenEliminationConfig | TokenTuneConfig | WTACRSConfig):
        for name, value in (("seed", seed), ("positions", positions), ("calibration", calibration)):
            if value is not None:
                raise ValueError(f"{name} must be None with a {type(config).__name__}, got {value!r}")
        if autocast_adapter_dtype is not True:
            raise ValueError(
                f"autocast_adapter_dtype must be True with a {type(config).__name__}, got {autocast_adapter_dtype!r}"
            )
        if isinstance(config, TokenTuneConfig):
            return elimination.tune(model, config)
        if isinstance(config, WTACRSConfig):
            return wta_crs.sample(model, config)
        return elimination.eliminate(model, config)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return commit(
        model, plan_injection(model, config, Choices(generator, autocast_adapter_dtype, positions, calibration))
    )


def commit(model: nn.Module, plan: Plan) -> InjectionReport:
    """Carries a plan out."""
    config = plan.injection.config
    notes = list(plan.notes)
    model.requires_grad_(False)
    for path, layer in plan.layers.items():
        for place in plan.places[path]:
            put_module(model, place, layer)
    for paths, names in plan.mlps.items():
        mlp = SwiGLUMLP.over(model.get_submodule(paths[0]), *names)
        for place in paths:
            put_module(model, place, mlp)
    for owner, name, parameter in plan.untied:
        setattr(owner, name, parameter)
    setattr(model, STATE, plan.injection)
    if not config.inference_mode:
        for parameter in _trained_beside(model, plan):
            parameter.requires_grad_(True)
    else:
        for layer in plan.layers.values():
            for parameter in plan.family.parameters(layer):
                parameter.requires_grad_(False)
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


def _trained_beside(model: nn.Module, plan: Plan) -> Iterator[nn.Parameter]:
    """What trains besides the adapters."""
    bias = plan.injection.config.bias
    if bias == "lora_only":
        yield from (layer.bias for layer in plan.layers.values() if layer.bias is not None)
    elif bias == "all":
        for name, parameter in model.named_parameters():
            if targets.ends_in(name, "bias"):
                yield parameter
    for module in plan.saved.values():
        yield from (parameter for parameter in module.parameters() if parameter.is_floating_point())


def eject(model: nn.Module, merge: bool = True) -> None:
    """Puts the plain layer back in the place of every adapter layer, and undoes what `inject` froze.

    Biases and modules_to_save that were trained keep their trained values. Decoder layers that select tokens get
    their class back, layers that sample gradients end it; `elimination.remove` and `wta_crs.remove` do that alone.

    Args:
        model: a model with adapter layers of ours, or with layers that select tokens or sample gradients.
        merge: True leaves the update in the weights, rounded once (for LoRA in a new weight tensor per layer; where
            it was tied to another module's, that tie ends, with a warning). False drops the update; the weights are
            the original ones, to the bit.

    Raises:
        ValueError: the model has no adapter layers of ours, or channels of it were co-permuted and cannot be moved
            back. Nothing has changed then.
    """
    model = unwrapped(model)
    selects = bool(elimination.selective_layers(model))
    if not adapter_layers(model) and (selects or wta_crs.sampling_layers(model)):
        _end_training_aids(model, selects)
        return
    layers = _present(model)
    if "" in layers:
        raise ValueError(f"model is itself a {type(layers['']).__name__}; use its to_linear(merge)")
    if merge:
        _check_mergeable(layers)
    injection = injection_of(model)
    if injection is not None and injection.permutation is not None:
        injection.permutation.check(model, layers)
    if selects:
        elimination.check_removable(model)
    everything = dict(model.named_modules(remove_duplicate=False))
    places = paths_of(everything)
    tied = _tied_weights(model, layers) if merge else []
    for layer in layers.values():
        # One layer at a time, so that merging needs the memory of one weight and not of all.
        linear = layer.to_linear(merge)
        for place in places[id(layer)]:
            put_module(model, place, linear)
    for paths in paths_of(
        {path: module for path, module in everything.items() if isinstance(module, SwiGLUMLP)}
    ).values():
        mlp = model.get_submodule(paths[0]).restored()
        for place in paths:
            put_module(model, place, mlp)
    if injection is not None:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name in injection.trainable_before)
        delattr(model, STATE)
        if injection.permutation is not None:
            injection.permutation.undo(model)
    _end_training_aids(model, selects)
    if tied:
        warnings.warn(f"merged weights are no longer tied to other modules': {shortened(tied, ', ')}", stacklevel=2)


def _end_training_aids(model: nn.Module, eliminates: bool) -> None:
    if eliminates:
        elimination.remove(model)
    if wta_crs.sampling_layers(model):
        wta_crs.remove(model)


def _tied_weights(model: nn.Module, layers: dict[str, AdapterLayer]) -> list[str]:
    owners = weight_owners(model)
    return [path for path, layer in layers.items() if len(owners[memory_of(layer.weight)]) > 1]


def _present(model: nn.Module) -> dict[str, AdapterLayer]:
    layers = adapter_layers(model)
    if not layers:
        raise ValueError(
            "model has no LoRALinear, SparseDeltaLinear, S2FTLinear or S2FTConv1D layers; for PEFT's own layers use "
            "PEFT's merge_adapter, unmerge_adapter, merge_and_unload"
        )
    return layers


def _check_mergeable(layers: Mapping[str, AdapterLayer]) -> None:
    for path, layer in layers.items():
        reason = getattr(layer, "merge_obstacle", None)
        if reason is not None:
            raise ValueError(f"{path} cannot be merged: {reason}")


def merge(model: nn.Module) -> None:
    """Merges every adapter layer of the model: it then computes with one matrix per layer and no adapter.

    Raises:
        ValueError: the model has no adapter layers of ours, or one that cannot be merged; nothing has changed.
    """
    present = _present(model)
    _check_mergeable(present)
    layers = [layer for layer in present.values() if not layer.merged]
    if not layers:
        warnings.warn("all adapters are merged already; nothing to do", stacklevel=2)
    for layer in layers:
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undoes `merge`, to the bit.

    Raises:
        ValueError: the model has no adapter layers of ours.
    """
    layers = [layer for layer in _present(model).values() if layer.merged]
    if not layers:
        warnings.warn("no adapter is merged; nothing to do", stacklevel=2)
    for layer in layers:
        layer.unmerge()
