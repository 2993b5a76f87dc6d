"""`save_adapter` and `load_adapter`: a model's adapter to and from a directory in PEFT's format."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import targets
from .adapter_files import KEY_PREFIX, AdapterFiles, check_tensors, read_adapter, write_adapter
from .config import LoraConfig
from .inject import commit
from .nn.lora import LoRALinear
from .planning import Injection, first_peft_layer, injection_of, lora_layers, plan_injection, unwrapped
from .reports import InjectionReport


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], *, is_main_process: bool = True) -> None:
    """Writes the model's adapter to a directory that PEFT's `PeftModel.from_pretrained` and `load_adapter` read.

    `adapter_config.json` and `adapter_model.safetensors`, with PEFT's keys; biases and modules_to_save as the
    configuration says. Each file is written aside, flushed and renamed, so an interrupted save leaves the previous
    adapter. A merged model saves the same adapter as an unmerged one. For a PEFT model this is its own
    `save_pretrained`, put in place the same way.

    Args:
        model: a model after `inject`, one built with `nn.LoRALinear`, or a PEFT model (accelerated or not).
        directory: created when missing.
        is_main_process: False takes part in gathering sharded tensors without writing.

    Raises:
        ValueError: the model has no adapter, or not one that one file can describe.
    """
    model = unwrapped(model)
    if first_peft_layer(model) is not None:
        from .integrations.peft_io import save_peft_adapter

        save_peft_adapter(model, directory, is_main_process)
        return
    injection = injection_of(model) or _described(model)
    tensors = {key: _whole(tensor) for key, tensor in _adapter_tensors(model, injection).items()}
    if is_main_process:
        write_adapter(directory, _config_to_write(model, injection.config), tensors)


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
        model: a bare model, one after `inject`, one built with `nn.LoRALinear`, or a PEFT model with one active
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
    config = LoraConfig.from_dict(files.config)
    if lora_layers(model):
        if any(layer.merged for layer in lora_layers(model).values()):
            raise ValueError("model has merged layers; unmerge it before loading an adapter into it")
        injection = injection_of(model) or _described(model)
        expected = _adapter_tensors(model, injection)
        check_tensors(files, expected)
        _check_function(config, {path: _layer(model, path) for path in injection.layers}, files)
        _warn_of_other_base(model, config)
        _copy(files.tensors, expected)
        return None
    present = [path for path, _ in model.named_modules(remove_duplicate=False)]
    saved = [name for name in config.modules_to_save or () if any(targets.ends_in(path, name) for path in present)]
    config = replace(config, inference_mode=not is_trainable, modules_to_save=saved or None)
    plan = plan_injection(model, config, None, autocast_adapter_dtype)
    check_tensors(files, _tensors(model, plan.layers, plan.saved, config.bias))
    _warn_of_other_base(model, config)
    report = commit(model, plan)
    _copy(files.tensors, _tensors(model, plan.layers, plan.saved, config.bias))
    if not is_trainable:
        model.eval()
    return report


def _layer(model: nn.Module, path: str) -> LoRALinear:
    layer = model.get_submodule(path)
    if not isinstance(layer, LoRALinear):
        raise ValueError(f"{path} was adapted by inject and now is a {type(layer).__name__}; was it replaced?")
    return layer


def _adapter_tensors(model: nn.Module, injection: Injection) -> dict[str, Tensor]:
    layers = {path: _layer(model, path) for path in injection.layers}
    saved = {path: model.get_submodule(path) for path in injection.saved_modules}
    return _tensors(model, layers, saved, injection.config.bias)


def _tensors(
    model: nn.Module, layers: Mapping[str, LoRALinear], saved: Mapping[str, nn.Module], bias: str
) -> dict[str, Tensor]:
    """The adapter's live tensors by PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        tensors[f"{KEY_PREFIX}{path}.lora_A.weight"] = layer.lora_a
        tensors[f"{KEY_PREFIX}{path}.lora_B.weight"] = layer.lora_b
        if bias == "lora_only" and layer.bias is not None:
            tensors[f"{KEY_PREFIX}{path}.base_layer.bias"] = layer.bias
    if bias == "all":
        for name, parameter in model.named_parameters():
            path, _, last = name.rpartition(".")
            if last == "bias" and not any(name.startswith(f"{outer}.") for outer in saved):
                tensors[f"{KEY_PREFIX}{path}.base_layer.bias" if path in layers else KEY_PREFIX + name] = parameter
    for path, module in saved.items():
        for name, value in module.state_dict(keep_vars=True).items():
            if isinstance(value, Tensor):
                tensors[f"{KEY_PREFIX}{path}.{name}"] = value
    return tensors


def _described(model: nn.Module) -> Injection:
    """The configuration of a model built by hand from `LoRALinear` layers."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("model has no adapter: neither LoRALinear nor PEFT layers")
    if "" in layers:
        raise ValueError("model is itself a LoRALinear; put it into a module, so that it has a path to be saved under")
    options = [layer.options for layer in layers.values()]
    if len({option.use_rslora for option in options}) > 1:
        raise ValueError("one adapter file cannot hold layers with and without use_rslora")
    r = Counter(option.r for option in options).most_common(1)[0][0]
    lora_alpha = Counter(option.lora_alpha for option in options).most_common(1)[0][0]
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=options[0].lora_dropout,
        use_rslora=options[0].use_rslora,
        target_modules=targets.names_for(layers, [path for path, _ in model.named_modules(remove_duplicate=False)]),
        rank_pattern={f"^{re.escape(path)}": layer.r for path, layer in layers.items() if layer.r != r},
        alpha_pattern={
            f"^{re.escape(path)}": layer.lora_alpha for path, layer in layers.items() if layer.lora_alpha != lora_alpha
        },
    )
    return Injection(config, tuple(layers), (), frozenset())


def _base_name(model: nn.Module) -> str | None:
    """The name or path the base model was loaded from, as transformers remembers it."""
    config = getattr(model, "config", None)
    return getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None) or None


def _config_to_write(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    base = config.base_model_name_or_path or _base_name(model)
    values = replace(config, base_model_name_or_path=base, inference_mode=True).to_dict()
    if config.task_type is None:  # what PEFT's AutoPeftModel needs to find the class
        kind = type(model)
        values["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return values


def _whole(tensor: Tensor) -> Tensor:
    """A sharded DTensor gathered (every rank must take part); any other tensor as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _check_function(config: LoraConfig, layers: Mapping[str, LoRALinear], files: AdapterFiles) -> None:
    """Raises when the file's scaling is not the model's: the same tensors would compute something else."""
    for path, layer in layers.items():
        alpha = targets.pattern_value(config.alpha_pattern, path, config.lora_alpha)
        scaling = config.options(r=layer.r, lora_alpha=alpha).scaling
        if not math.isclose(scaling, layer.options.scaling):
            raise ValueError(
                f"the adapter in {files.directory} scales {path} by {scaling:g} (lora_alpha={alpha:g}, r={layer.r}, "
                f"use_rslora={config.use_rslora}), the model by {layer.options.scaling:g}; inject with the file's "
                "configuration, or eject and load into the bare model"
            )


def _warn_of_other_base(model: nn.Module, config: LoraConfig) -> None:
    here = _base_name(model)
    if here and config.base_model_name_or_path and here != config.base_model_name_or_path:
        warnings.warn(
            f"the adapter was trained on {config.base_model_name_or_path!r}, this model is {here!r}", stacklevel=3
        )


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    rounded = [
        key for key, tensor in tensors.items() if torch.promote_types(tensor.dtype, into[key].dtype) != into[key].dtype
    ]
    if rounded:
        warnings.warn(f"{len(rounded)} of the adapter's tensors are rounded to the model's dtype", stacklevel=3)
    for key, tensor in tensors.items():
        into[key].copy_(tensor)
