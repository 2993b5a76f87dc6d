"""Which decoder layers of a model select tokens: taking them over, giving them back, and what they did."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..config import TokenConfig, TokenEliminationConfig
from ..nn.elimination_options import EliminationOptions
from ..nn.linear import type_name
from ..nn.selections import Selections, Sharing
from ..nn.selective_layer import SelectiveLayer, class_over
from ..nn.token_elimination import TokenElimination
from ..nn.token_tune import TokenTune
from ..planning import paths_of, put_module, shortened, unwrapped
from ..reports import EliminatedLayer, EliminationReport, TokenTuneReport
from ..schedules.layers import transformer_layers

STATE = "_peft_kernels_token_elimination"
"""Name of the attribute that holds the `Elimination`, of the module that holds the decoder layers."""


@dataclass(frozen=True)
class Elimination:
    """What `eliminate` or `tune` remembers on the model; travels with copies and pickles of it.

    Attributes:
        config: as it was given.
        selections: what its layers share.
        dense: reasons by path, of decoder layers that were to select tokens and cannot.
    """

    config: TokenConfig
    selections: Selections
    dense: dict[str, str]


def eliminating_layers(model: nn.Module) -> dict[str, TokenElimination]:
    """The model's `nn.TokenElimination` layers by path, a layer used at several places once, by its first."""
    return {path: module for path, module in model.named_modules() if isinstance(module, TokenElimination)}


def selective_layers(model: nn.Module) -> dict[str, SelectiveLayer]:
    """The model's layers that select tokens, whatever for, by path; a layer used at several places by its first."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SelectiveLayer)}


def config_of(model: nn.Module) -> TokenConfig | None:
    """The configuration that the model selects tokens by, or None."""
    state = _state_of(model)
    return None if state is None else state.config


def saved_config(model: nn.Module) -> TokenConfig | None:
    """`config_of`, with the thresholds that layers have now, for the file beside an adapter."""
    config = config_of(model)
    if not isinstance(config, TokenEliminationConfig):
        return config
    layers = [layer.elimination for layer in eliminating_layers(unwrapped(model)).values()]
    live = {layer.index: layer.options.threshold for layer in layers if layer.index == layer.leader}
    if live == config.thresholds(list(live)):
        return config
    return replace(config, threshold={i: -math.inf if value is None else float(value) for i, value in live.items()})


def _state_of(model: nn.Module) -> Elimination | None:
    """What `take_layers` remembers, wherever in or around the layers' list it was asked."""
    return next((module.__dict__[STATE] for module in model.modules() if STATE in module.__dict__), None)


def eliminate(model: nn.Module, config: TokenEliminationConfig) -> EliminationReport:
    """Makes decoder layers of a Llama-like model compute for some tokens alone while they train; `inject` calls it.

    Parameters, their names and what trains stay as they are; adapters may be injected before or after.

    Args:
        model: a causal language model whose decoder layers are pre-norm and sequential, as those of Llama, Mistral,
            Qwen and the first Gemma; call before `torch.compile`, DistributedDataParallel and `fully_shard`.
        config: see there.

    Returns:
        Layer by layer what runs; layers that cannot, where `config.layers` is None, with the reason.

    Raises:
        TypeError, ValueError: the model has no such layers, a named layer is none, or it eliminates tokens already. The
            model is then as it was.
    """
    config = replace(config)  # a copy, checked anew: the caller's may have been edited since

    def options(ratio: float) -> EliminationOptions:
        return EliminationOptions(ratio, config.block_size, config.score, config.apply_to, config.train_only)

    named = config.layers is not None or config.schedule is not None
    take_layers(model, TokenElimination, config, options, Selections(config.select_every, config.seed), named)
    found = report(model)
    assert isinstance(found, EliminationReport)
    return found


def take_layers(
    model: nn.Module,
    kind: type[SelectiveLayer],
    config: TokenConfig,
    options: Callable[[float], EliminationOptions],
    selections: Selections,
    named: bool,
) -> None:
    """Puts layers of `kind` in the place of a model's decoder layers, those that `config.ratios` gives a ratio.

    Args:
        model: see `eliminate`.
        kind: of layer.
        config: kept on the model.
        options: of a layer, by its ratio.
        selections: what the layers share.
        named: whether the user chose the layers, so that one that cannot be taken is an error.

    Raises:
        TypeError, ValueError: as `eliminate`. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if unwrapped(model) is not model:
        raise ValueError("model is wrapped by torch.compile or DistributedDataParallel; inject into the model first")
    for path, layer in selective_layers(model).items():
        raise ValueError(f"model {layer.does} already (at {path}); elimination.remove it first")
    layers = list(transformer_layers(model).items())
    taken, refused = _taken_over(layers, kind, config, options, selections, named)
    holders = paths_of(dict(model.named_modules(remove_duplicate=False)))
    places = {path: holders[id(model.get_submodule(path))] for path in taken}
    for path, layer in taken.items():
        for place in places[path]:
            put_module(model, place, layer)
    # Beside the layers: models that wrap this one, and those that it wraps, find it too.
    setattr(model.get_submodule(layers[0][0].rpartition(".")[0]), STATE, Elimination(config, selections, refused))


def _taken_over(
    layers: list[tuple[str, nn.Module]],
    kind: type[SelectiveLayer],
    config: TokenConfig,
    options: Callable[[float], EliminationOptions],
    selections: Selections,
    named: bool,
) -> tuple[dict[str, SelectiveLayer], dict[str, str]]:
    """The new layers, and reasons for those that cannot be, by path. Raises what `eliminate` does."""
    anatomies, refused = {}, {}
    for index, ratio in config.ratios(len(layers)).items():
        path, module = layers[index]
        own = options(ratio)
        try:
            anatomies[index] = own, kind.checked_anatomy(module, own)
        except (TypeError, ValueError) as error:
            refused[path] = str(error).removeprefix(f"{kind.__name__} cannot take this layer over: ")
    if refused and (named or not anatomies):
        found = shortened([f"{path}: {reason}" for path, reason in refused.items()], "; ", limit=3)
        raise ValueError(f"model has decoder layers that {kind.cannot}: {found}")
    taken = {}
    thresholds = config.thresholds(list(anatomies)[:: selections.select_every])
    for number, (index, (own, anatomy)) in enumerate(anatomies.items()):
        if number % selections.select_every == 0:
            sharing = Sharing(replace(own, threshold=thresholds[index]), index)
        path, module = layers[index]
        taken[path] = kind.over(module, sharing, anatomy, selections, index)
    return taken, refused


def remove(model: nn.Module) -> None:
    """Gives every layer that selects tokens its class back; adapters in it stay.

    Raises:
        ValueError: there is none, or one was sharded since. Nothing has changed then.
    """
    model = unwrapped(model)
    layers = check_removable(model)
    holders = paths_of(dict(model.named_modules(remove_duplicate=False)))
    for layer in layers.values():
        restored = layer.restored()
        for place in holders[id(layer)]:
            put_module(model, place, restored)
    for module in model.modules():
        module.__dict__.pop(STATE, None)


def check_removable(model: nn.Module) -> dict[str, SelectiveLayer]:
    """The layers that `remove` gives their class back; raises what it raises."""
    layers = selective_layers(model)
    if not layers:
        raise ValueError("model has no layers that eliminate tokens or differentiate by selected ones")
    for path, layer in layers.items():
        if type(layer) is not class_over(layer.base_type, layer.replaced_type):
            raise ValueError(f"{path} is a {type_name(layer)}, made of a layer that {layer.does} (by fully_shard?)")
        if not path:
            raise ValueError(f"model is itself a layer that {layer.does}; use its restored()")
    return layers


def set_predictors(model: nn.Module, predictors: Mapping[int, Callable[[Tensor], Tensor]]) -> None:
    """Gives layers with score="predictor" what predicts their scores.

    Args:
        model: one that eliminates tokens.
        predictors: by index of the decoder layer; see `nn.token_scores.Predictor`.

    Raises:
        ValueError, TypeError: a layer is named that has no use for one, or one is not callable. Nothing has changed.
    """
    layers = {
        layer.elimination.index: layer
        for layer in eliminating_layers(unwrapped(model)).values()
        if layer.elimination.options.score == "predictor"
    }
    for index, predictor in predictors.items():
        if index not in layers:
            raise ValueError(f'predictors must be for layers with score="predictor", {sorted(layers)}, got {index}')
        if not callable(predictor):
            raise TypeError(f"predictors[{index}] must be callable, got {type(predictor).__name__}")
    for index, predictor in predictors.items():
        layers[index].elimination.predictor = predictor


def report(model: nn.Module) -> EliminationReport | TokenTuneReport:
    """What the layers that select tokens did so far, and which decoder layers are none.

    Calls within a graph of `torch.compile` are not counted.

    Returns:
        An `EliminationReport`; for a model with a `TokenTuneConfig` a `TokenTuneReport`.
    """
    model = unwrapped(model)
    state = _state_of(model)
    refused = {} if state is None else state.dense
    selective = selective_layers(model)
    every = {**_decoder_layers(model), **selective}
    rows = []
    for path, module in every.items():
        if not isinstance(module, SelectiveLayer):
            reason = refused.get(path, "it was not asked to")
            rows.append(EliminatedLayer(path, type_name(module), reason=reason))
            continue
        own = module.elimination
        rows.append(
            EliminatedLayer(
                path,
                type_name(module, module.replaced_type),
                keep=float(own.options.keep),
                score=own.options.score_name,
                apply_to=own.options.apply_to if isinstance(module, TokenElimination) else None,
                threshold=None if own.options.threshold is None else float(own.options.threshold),
                own_parts=own.anatomy.reasons(),
                calls=own.calls,
                tokens=own.tokens,
                kept_tokens=int(own.kept_tokens),
                dense_calls=dict(own.dense_calls),
            )
        )
    tunes = any(isinstance(layer, TokenTune) for layer in selective.values())
    return (TokenTuneReport if tunes else EliminationReport)(tuple(rows))


def _decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All of them, in order; none of a module that holds no list of layers."""
    try:
        return transformer_layers(model)
    except ValueError:
        return {}
