"""Sampled weight gradients on a whole model: `inject` with a `WTACRSConfig` begins them, `remove` or `eject` ends them.

A `LoRALinear` gets a `RowSampling`, a trainable `nn.Linear` becomes a `WTACRSLinear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from . import targets
from .config import AdapterConfig, WTACRSConfig
from .nn.linear import takeover_obstacle, type_name
from .nn.lora import LoRALinear
from .nn.row_sampling import RowSampling
from .nn.wta_crs import WTACRSLinear
from .planning import first_peft_layer, paths_of, put_module, shortened, unwrapped
from .reports import LayerReport, SamplingReport


def sampling_layers(model: nn.Module) -> dict[str, LoRALinear | WTACRSLinear]:
    """The model's layers with a sampled gradient by path, a layer used at several places once, by its first."""
    return {path: module for path, module in model.named_modules() if _samples(module)}


def _samples(module: nn.Module) -> bool:
    return isinstance(module, LoRALinear | WTACRSLinear) and module.row_sampling is not None


def sample(model: nn.Module, config: WTACRSConfig) -> SamplingReport:
    """Has layers of a model keep a sample of their input's rows for backward; `inject` calls it.

    Parameters, their names and what trains stay as they are. Inject adapters before, as they take no layer over that
    samples already; token elimination before or after.

    Args:
        model: any module; call before `torch.compile`, DistributedDataParallel and `fully_shard`.
        config: see there.

    Returns:
        Layer by layer what samples, and why others do not.

    Raises:
        TypeError, ValueError: nothing matches, a named module cannot sample, the model has PEFT's adapters, or layers
            sample already. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if unwrapped(model) is not model:
        raise ValueError("model is wrapped by torch.compile or DistributedDataParallel; inject into the model first")
    present = sampling_layers(model)
    if present:
        raise ValueError(f"model samples gradients already (at {next(iter(present))}); wta_crs.remove it first")
    if (path := first_peft_layer(model)) is not None:  # fused or not, these would pass a sample by
        raise ValueError(f"model has PEFT adapters (at {path}); sampling needs layers of ours: inject a LoraConfig")
    config = replace(config)  # a copy, checked anew: the caller's may have been edited since
    modules = dict(model.named_modules(remove_duplicate=False))
    places = paths_of(modules)
    rows = _choose(model, config.targets(), modules, places)
    new = {
        row.path: WTACRSLinear.from_linear(module, config.keep_ratio)
        for row in rows
        if row.fused and not isinstance(module := modules[row.path], LoRALinear)
    }
    for row in rows:
        module = modules[row.path]
        if row.fused and isinstance(module, LoRALinear):
            module.row_sampling = RowSampling(config.keep_ratio)
    for path, layer in new.items():
        for place in places[id(modules[path])]:
            put_module(model, place, layer)
    return SamplingReport(tuple(rows), keep_ratio=config.keep_ratio)


def _choose(
    model: nn.Module, config: AdapterConfig, modules: Mapping[str, nn.Module], places: Mapping[int, list[str]]
) -> list[LayerReport]:
    """One row per linear layer, `fused` where it is to sample."""
    everything = targets.wants_all_linear(config)
    output = targets.output_layer(model, config) if everything else None
    rows, refused = [], []
    for paths in places.values():
        module = modules[paths[0]]
        named = [path for path in paths if targets.exclusion(config, path) is None]
        if not everything:
            named = [path for path in named if targets.is_target(config, path)]
        if not isinstance(module, nn.Linear) and (everything or not named):
            continue
        path = named[0] if named else paths[0]
        reason = _obstacle(model, path, modules)
        if not named:
            reason = targets.exclusion(config, path) or "target_modules does not name it"
        elif module is output:
            reason = "the output layer, which all-linear leaves out"
        elif reason is not None and not everything:
            refused.append(f"{path or 'the model'}: {reason}")
        rows.append(LayerReport(path, type_name(module), reason))
    if refused:
        raise ValueError(f"target_modules names modules whose gradient cannot be sampled: {shortened(refused, '; ')}")
    if not any(row.fused for row in rows):
        found = shortened(sorted(f"{row.path or 'the model'}: {row.reason}" for row in rows), "; ")
        raise ValueError(f"no layer's gradient can be sampled: {found or 'the model has no linear layer'}")
    return rows


def _obstacle(model: nn.Module, path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Why the module at `path` cannot sample; None when it can."""
    module = modules[path]
    if isinstance(module, LoRALinear):
        return None
    reason = takeover_obstacle(module)
    if reason is not None:
        return reason
    if not path:
        return "it is the whole model; use nn.WTACRSLinear.from_linear"
    if not module.weight.requires_grad:
        return "its weight does not train, so it keeps no input"
    return targets.bypassed(model, path, modules[path.rpartition(".")[0]])


def remove(model: nn.Module) -> None:
    """Ends sampling in every layer: adapters stay, and each `WTACRSLinear` is an `nn.Linear` again.

    Raises:
        ValueError: no layer samples, or model is itself a `WTACRSLinear`. Nothing has changed then.
    """
    model = unwrapped(model)
    layers = sampling_layers(model)
    if not layers:
        raise ValueError("model has no layers with a sampled gradient")
    if isinstance(model, WTACRSLinear):
        raise ValueError("model is itself a WTACRSLinear; use its to_linear()")
    places = paths_of(dict(model.named_modules(remove_duplicate=False)))
    for layer in layers.values():
        if isinstance(layer, LoRALinear):
            layer.row_sampling = None
            continue
        linear = layer.to_linear()
        for place in places[id(layer)]:
            put_module(model, place, linear)
