"""`save_adapter` and `load_adapter`: a model's adapter to and from a directory in PEFT's format."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import targets
from .adapter_files import KEY_PREFIX, read_adapter, write_adapter
from .config import AdapterConfig, TokenEliminationConfig, TokenTuneConfig
from .elimination.model import saved_config
from .families import AdapterLayer, Choices, Family, adapter_layers, family_of_file, family_of_layers
from .inject import commit
from .planning import Injection, abandon, base_name, first_peft_layer, injection_of, plan_injection, unwrapped
from .reports import InjectionReport


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], *, is_main_process: bool = True) -> None:
    """Writes the model's adapter to a directory that `load_adapter` reads, and PEFT where it knows the method.

    `adapter_config.json` and `adapter_model.safetensors`, with PEFT's keys; biases and modules_to_save as the
    configuration says. Sparse deltas are written as an adapter of PEFT's Super-Tuning, which PEFT loads, where every
    layer trains the same share of its entries; otherwise, and for slices, in a format of ours that PEFT does not know
    (`slices.to_lora` writes slices for PEFT). Each file is written aside, flushed and renamed, so an interrupted save
    leaves the previous adapter. A merged model saves the same adapter as an unmerged one. For a PEFT model this is its
    own `save_pretrained`, put in place the same way.

    An adapter does not say whether tokens were eliminated while it was trained, or which had gradients: it is the same
    for a model that does neither. Where that was so, the configuration is written beside it, `token_elimination.json`
    for `TokenEliminationConfig.load` or `token_tune.json` for `TokenTuneConfig.load`; `load_adapter` reads neither.

    Args:
        model: a model after `inject`, one built with our drop-ins, or a PEFT model (accelerated or not).
        directory: created when missing.
        is_main_process: False takes part in gathering sharded tensors without writing.

    Raises:
        ValueError: the model has no adapter, or not one that one file can describe.
    """
    model = unwrapped(model)
    if first_peft_layer(model) is not None:
        from .integrations.peft_io import save_peft_adapter

        save_peft_adapter(model, directory, is_main_process)
        _save_token_config(model, directory, is_main_process)
        return
    injection, family, layers = _adapter_of(model)
    live = _tensors(model, family, layers, _saved_modules(model, injection), injection.config.bias)
    tensors = {key: _whole(tensor) for key, tensor in live.items()}
    if is_main_process:
        write_adapter(directory, _config_to_write(model, injection.config, family, layers), tensors)
    _save_token_config(model, directory, is_main_process)


def _save_token_config(model: nn.Module, directory: str | os.PathLike[str], is_main_process: bool) -> None:
    if not is_main_process:
        return
    config = saved_config(model)
    for kind in (TokenEliminationConfig, TokenTuneConfig):  # of an adapter that was here before
        if not isinstance(config, kind):
            (Path(directory) / kind.file_name).unlink(missing_ok=True)
    if config is not None:
        config.save(directory)


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
) -> InjectionReport | None:
    """Loads an adapter that `save_adapter` or PEFT wrote.

    Into a model without adapters it is injected first, with the file's configuration; the model then is in evaluation
    mode with everything frozen unless `is_trainable`, as after PEFT's `from_pretrained`. Into a model that has one
    already, only tensors are copied, and its configuration must compute the same function. Everything is checked
    before the model is touched: keys, shapes, dtypes, finite numbers, scaling. A different `base_model_name_or_path`
    is a warning.

    Args:
        model: a bare model, one after `inject`, one built with our drop-ins, or a PEFT model with one active
            adapter, which is then overwritten.
        directory: a local adapter directory; pickles are never read.
        is_trainable: leave the adapter trainable where it is injected here.
        autocast_adapter_dtype: as in `inject`, where it is injected here.

    Returns:
        The report of the injection, None where the model had an adapter.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError, TypeError: a file is damaged or does not fit; the model is as it was.
    """
    model = unwrapped(model)
    files = read_adapter(directory)
    if first_peft_layer(model) is not None:
        from .integrations.peft_io import load_peft_adapter

        load_peft_adapter(model, files)
        return None
    family = family_of_file(files.config)
    files = family.file_tensors(files)
    present = adapter_layers(model)
    if present and (found := family_of_layers(present.values())) is not family:
        raise ValueError(f"the adapter in {files.directory} is of family {family.name}, the model's of {found.name}")
    config = family.config_type.from_dict(files.config)
    if present:
        if any(layer.merged for layer in present.values()):
            raise ValueError("model has merged layers; unmerge it before loading an adapter into it")
        injection, found, layers = _adapter_of(model)
        if found is not family:
            raise ValueError(
                f"the adapter in {files.directory} is of family {family.name}, the model's of {found.name}"
            )
        saved = _saved_modules(model, injection)
        family.check_tensors(files, _tensors(model, family, layers, saved, injection.config.bias))
        family.check_function(config, layers, files)
        _warn_of_other_base(model, config)
        _load(model, family, layers, saved, injection.config.bias, files.tensors)
        return None
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    names = [name for name in config.modules_to_save or () if any(targets.ends_in(path, name) for path in paths)]
    config = replace(config, inference_mode=not is_trainable, modules_to_save=names or None)
    plan = plan_injection(model, config, Choices(None, autocast_adapter_dtype, family.positions_in(files)))
    try:
        family.check_tensors(files, _tensors(model, family, plan.layers, plan.saved, config.bias))
        _warn_of_other_base(model, config)
    except BaseException:
        abandon(model, plan)
        raise
    report = commit(model, plan)
    _load(model, family, plan.layers, plan.saved, config.bias, files.tensors)
    if not is_trainable:
        model.eval()
    return report


def _adapter_of(model: nn.Module) -> tuple[Injection, Family, dict[str, AdapterLayer]]:
    """How the model was adapted, and its adapter layers by path."""
    layers = adapter_layers(model)
    injection = injection_of(model)
    if injection is None:
        if not layers:
            raise ValueError(
                "model has no adapter: neither LoRALinear, SparseDeltaLinear, S2FTLinear, S2FTConv1D nor PEFT layers"
            )
        if "" in layers:
            name = type(layers[""]).__name__
            raise ValueError(f"model is itself a {name}; put it into a module, so that it has a path to be saved under")
        family = family_of_layers(layers.values())
        paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
        return Injection(family.described(layers, paths), tuple(layers), (), frozenset()), family, layers
    for path in injection.layers:
        if path not in layers:
            kind = type(model.get_submodule(path)).__name__
            raise ValueError(f"{path} was adapted by inject and now is a {kind}; was it replaced?")
    return injection, family_of_layers(layers.values()), {path: layers[path] for path in injection.layers}


def _saved_modules(model: nn.Module, injection: Injection) -> dict[str, nn.Module]:
    return {path: model.get_submodule(path) for path in injection.saved_modules}


def _tensors(
    model: nn.Module, family: Family, layers: Mapping[str, AdapterLayer], saved: Mapping[str, nn.Module], bias: str
) -> dict[str, Tensor]:
    """The adapter's live tensors by PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        tensors.update({KEY_PREFIX + key: tensor for key, tensor in family.tensors(path, layer).items()})
    return {**tensors, **_tensors_beside(model, layers, saved, bias)}


def _tensors_beside(
    model: nn.Module, layers: Mapping[str, AdapterLayer], saved: Mapping[str, nn.Module], bias: str
) -> dict[str, Tensor]:
    """Trained biases and modules_to_save, by PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    if bias == "lora_only":
        for path, layer in layers.items():
            if layer.bias is not None:
                tensors[f"{KEY_PREFIX}{path}.base_layer.bias"] = layer.bias
    elif bias == "all":
        for name, parameter in model.named_parameters():
            path, _, last = name.rpartition(".")
            if last == "bias" and not any(name.startswith(f"{outer}.") for outer in saved):
                tensors[f"{KEY_PREFIX}{path}.base_layer.bias" if path in layers else KEY_PREFIX + name] = parameter
    for path, module in saved.items():
        for name, value in module.state_dict(keep_vars=True).items():
            if isinstance(value, Tensor):
                tensors[f"{KEY_PREFIX}{path}.{name}"] = value
    return tensors


def _config_to_write(
    model: nn.Module, config: AdapterConfig, family: Family, layers: Mapping[str, AdapterLayer]
) -> dict[str, Any]:
    base = config.base_model_name_or_path or base_name(model)
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    values = family.file_config(replace(config, base_model_name_or_path=base, inference_mode=True), layers, paths)
    if config.task_type is None:  # what PEFT's AutoPeftModel needs to find the class
        kind = type(model)
        values["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return values


def _whole(tensor: Tensor) -> Tensor:
    """A sharded DTensor gathered (every rank must take part); any other tensor as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _warn_of_other_base(model: nn.Module, config: AdapterConfig) -> None:
    here = base_name(model)
    if here and config.base_model_name_or_path and here != config.base_model_name_or_path:
        warnings.warn(
            f"the adapter was trained on {config.base_model_name_or_path!r}, this model is {here!r}", stacklevel=3
        )


@torch.no_grad()
def _load(
    model: nn.Module,
    family: Family,
    layers: Mapping[str, AdapterLayer],
    saved: Mapping[str, nn.Module],
    bias: str,
    tensors: Mapping[str, Tensor],
) -> None:
    """Copies a file's checked tensors into the model."""
    into = _tensors(model, family, layers, saved, bias)
    rounded = [
        key
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and torch.promote_types(tensor.dtype, into[key].dtype) != into[key].dtype
    ]
    if rounded:
        warnings.warn(f"{len(rounded)} of the adapter's tensors are rounded to the model's dtype", stacklevel=3)
    for path, layer in layers.items():
        family.load(path, layer, tensors)
    for key, tensor in _tensors_beside(model, layers, saved, bias).items():
        tensor.copy_(tensors[key])
