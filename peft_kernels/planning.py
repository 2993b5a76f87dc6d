"""Working an injection out: which layers, which modules, what is in the way.

Nothing of the model is changed here, but the order of its channels where a configuration asks for a co-permutation:
a plan that is not carried out has to be abandoned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from . import targets
from .channels import Permutation
from .config import AdapterConfig
from .families import LAYER_TYPES, AdapterLayer, Choices, Family, family_of_config
from .nn.linear import type_name
from .reports import LayerReport

STATE = "_peft_kernels_injection"
"""Name of the model's attribute that holds its `Injection`."""

_NOT_CHOSEN = "nothing of it was chosen to train"

_PEFT_PARAMETERS = frozenset(("lora_A", "shira_weight", "supertuning_values"))
"""By which PEFT's layers of each method are known."""


@dataclass
class Injection:
    """What `inject` remembers on the model; travels with copies and pickles of it.

    Attributes:
        config: the configuration, with `target_modules` spelled out.
        layers: paths of the adapted layers.
        saved_modules: paths of the modules trained in full.
        trainable_before: names of the parameters that trained before.
        permutation: how channels of the model were moved, for `eject` to move them back; None where they were not.
    """

    config: Any
    layers: tuple[str, ...]
    saved_modules: tuple[str, ...]
    trainable_before: frozenset[str]
    permutation: Permutation | None = None


@dataclass(frozen=True)
class Plan:
    """An injection worked out and checked, with every new tensor allocated.

    Of the model nothing has changed yet but the order of its channels, where they were co-permuted.
    """

    injection: Injection
    family: Family
    layers: dict[str, AdapterLayer]
    places: dict[str, tuple[str, ...]]
    saved: dict[str, nn.Module]
    untied: tuple[tuple[nn.Module, str, nn.Parameter], ...]
    mlps: dict[tuple[str, ...], tuple[str, str, str]]
    rows: tuple[LayerReport, ...]
    notes: tuple[str, ...]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s and DistributedDataParallel's wrappers."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` in the place of the one at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def base_name(model: nn.Module) -> str | None:
    """The name or path the base model was loaded from, as transformers remembers it."""
    config = getattr(model, "config", None)
    return getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None) or None


def paths_of(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """All paths of each module, by its id."""
    paths: dict[int, list[str]] = {}
    for path, module in modules.items():
        paths.setdefault(id(module), []).append(path)
    return paths


def first_peft_layer(model: nn.Module) -> str | None:
    """The path of a LoRA, SHiRA or Super-Tuning layer of PEFT's, found without importing PEFT; None without any."""
    for path, module in model.named_modules():
        if "base_layer" in module._modules and not _PEFT_PARAMETERS.isdisjoint(module._modules):
            return path
    return None


def injection_of(model: nn.Module) -> Injection | None:
    """What `inject` left on this model, or None."""
    return unwrapped(model).__dict__.get(STATE)


def plan_injection(model: nn.Module, config: Any, choices: Choices) -> Plan:
    """Everything of `inject` that can fail; errors are those of `inject`."""
    family = family_of_config(config)
    _check_model(model)
    config = _checked_config(config, family)
    if choices.calibration is not None and choices.positions is None and not family.uses_calibration(config):
        raise ValueError("calibration must be None: this configuration chooses nothing by batches of data")
    config = family.resolved(model, config)
    modules = dict(model.named_modules(remove_duplicate=False))
    saved = _modules_to_save(config, modules)
    holders = paths_of(modules)
    chosen, rows, notes = _choose(model, config, family, modules, holders)
    linears = {path: modules[path] for path in chosen}
    parameters = model.named_parameters(remove_duplicate=False)
    before = frozenset(name for name, parameter in parameters if parameter.requires_grad)
    untied, untied_notes = _untied(model, saved)
    built = family.build(model, config, linears, choices)
    places = {path: tuple(holders[id(modules[path])]) for path in built.layers}
    rows = [replace(row, reason=_NOT_CHOSEN) if row.fused and row.path not in built.layers else row for row in rows]
    if targets.wants_all_linear(config):
        config = replace(config, target_modules=targets.names_for(chosen, modules), exclude_modules=None)
    injection = Injection(config, tuple(built.layers), tuple(saved), before, built.permutation)
    mlps = {tuple(holders[id(modules[path])]): names for path, names in built.mlps.items()}
    all_notes = (*notes, *built.notes, *untied_notes)
    return Plan(injection, family, built.layers, places, saved, untied, mlps, tuple(rows), all_notes)


def abandon(model: nn.Module, plan: Plan) -> None:
    """Leaves the model as it was before `plan_injection`."""
    if plan.injection.permutation is not None:
        plan.injection.permutation.undo(model)


def _checked_config(config: Any, family: Family) -> AdapterConfig:
    if isinstance(config, AdapterConfig):
        return replace(config)  # a copy, checked anew: the caller's may have been edited since
    return family.config_type.from_dict(config.to_dict())


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if unwrapped(model) is not model:
        raise ValueError("model is wrapped by torch.compile or DistributedDataParallel; inject into the model first")
    for path, module in model.named_modules():
        if isinstance(module, LAYER_TYPES):
            where = f"{path or 'the model'} is a {type(module).__name__}"
            raise ValueError(f"model has adapters already ({where}); eject them first")
    if (path := first_peft_layer(model)) is not None:
        raise ValueError(f"model has PEFT adapters already (at {path}); use accelerate(model) to speed them up")


def _modules_to_save(config: AdapterConfig, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules to train in full by path, outermost only; raises when a name means nothing here."""
    found: dict[str, nn.Module] = {}
    for name in config.modules_to_save or ():
        paths = [path for path in modules if targets.ends_in(path, name)]
        if not paths and name not in config.task_heads():
            raise ValueError(f"modules_to_save names {name!r}, but no module's path ends in it")
        for path in paths:
            module = modules[path]
            if isinstance(module, nn.ModuleList | nn.ModuleDict):
                raise TypeError(f"modules_to_save cannot hold {path}, a {type_name(module)}; name the modules in it")
            if not any(module is other for other in found.values()):
                found[path] = module
    return {path: module for path, module in found.items() if not any(path.startswith(f"{outer}.") for outer in found)}


def _choose(
    model: nn.Module,
    config: AdapterConfig,
    family: Family,
    modules: dict[str, nn.Module],
    holders: dict[int, list[str]],
) -> tuple[list[str], list[LayerReport], list[str]]:
    """Paths to replace, one report row per linear layer, and notes."""
    everything = targets.wants_all_linear(config)
    output = targets.output_layer(model, config) if everything else None
    owners = weight_owners(model)
    rows: list[LayerReport] = []
    refused: list[str] = []
    for paths in holders.values():
        module = modules[paths[0]]
        linear = family.adapts(module)
        if everything and not linear:
            continue
        verdicts = [(path, _not_named(config, path, module is output)) for path in paths]
        path, reason = next((verdict for verdict in verdicts if verdict[1] is None), verdicts[0])
        if reason is None:
            reason = _obstacle(model, path, modules, family, owners)
            if reason is not None and not everything:
                refused.append(f"{path or 'the model'}: {reason}")
        elif not linear:
            continue
        rows.append(LayerReport(path, type_name(module), reason))
    if refused:
        raise ValueError("target_modules names modules that cannot be adapted: " + shortened(refused, "; "))
    chosen = [row.path for row in rows if row.fused]
    if not chosen:
        raise ValueError(_nothing_matches(config, rows))
    notes = ["target_modules is not given: every linear layer is adapted"] if config.target_modules is None else []
    return chosen, rows, notes


def _not_named(config: AdapterConfig, path: str, is_output: bool) -> str | None:
    """Why the configuration does not mean the module at `path`; None when it does."""
    excluded = targets.exclusion(config, path)
    if excluded is not None:
        return excluded
    if targets.wants_all_linear(config):
        return "the output layer, which all-linear leaves out" if is_output else None
    return None if targets.is_target(config, path) else "target_modules does not name it"


def _obstacle(
    model: nn.Module, path: str, modules: dict[str, nn.Module], family: Family, owners: dict[int, set[int]]
) -> str | None:
    """Why the module at `path` cannot be replaced; None when it can."""
    if not path:
        return f"it is the whole model; use nn.{family.drop_in(modules[path]).__name__}.from_linear"
    parent = modules[path.rpartition(".")[0]]
    weight = modules[path]._parameters.get("weight")
    shared = weight is not None and len(owners[memory_of(weight)]) > 1
    return family.obstacle(modules[path], shared) or targets.bypassed(model, path, parent)


def memory_of(parameter: Tensor) -> int:
    """Where a parameter lies; parameters that are tied by their data lie at one place."""
    try:
        return parameter.data_ptr() or id(parameter)
    except (NotImplementedError, RuntimeError):  # a subclass without memory of its own
        return id(parameter)


def weight_owners(model: nn.Module) -> dict[int, set[int]]:
    """By the place in memory of each parameter, the ids of the modules that have it."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(memory_of(parameter), set()).add(id(module))
    return owners


def _nothing_matches(config: AdapterConfig, rows: list[LayerReport]) -> str:
    if targets.wants_all_linear(config):
        reasons = sorted({f"{row.path}: {row.reason}" for row in rows})
        found = shortened(reasons, "; ") if reasons else "the model has none"
        return f"no linear layer can be adapted: {found}"
    names = sorted({row.path.rpartition(".")[2] for row in rows})
    limits = {
        name: getattr(config, name)
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
        if getattr(config, name) is not None
    }
    asked = ", ".join(f"{name}={value!r}" for name, value in limits.items())
    return f"no layer matches {asked}; the model's linear layers are named {', '.join(names) or '(there are none)'}"


def shortened(items: list[str], separator: str, limit: int = 5) -> str:
    """The first `limit` items, and how many more there are."""
    more = f" (and {len(items) - limit} more)" if len(items) > limit else ""
    return separator.join(items[:limit]) + more


def _untied(
    model: nn.Module, saved: dict[str, nn.Module]
) -> tuple[tuple[tuple[nn.Module, str, nn.Parameter], ...], list[str]]:
    """Copies of the parameters that modules_to_save share with the rest of the model."""
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    copies: list[tuple[nn.Module, str, nn.Parameter]] = []
    notes: list[str] = []
    for path, module in saved.items():
        for inner, owner in module.named_modules():
            for name, parameter in owner._parameters.items():
                if parameter is None:
                    continue
                outside = [holder for holder in holders[id(parameter)] if not holder.startswith(f"{path}.")]
                if outside:
                    copies.append((owner, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad)))
                    here = ".".join(filter(None, (path, inner, name)))
                    notes.append(f"{here} was tied to {', '.join(outside)} and now is a copy, to train by itself")
    return tuple(copies), notes
