"""S2FT as a family: slices of weights by channels, in files that name the channels of the model as it was loaded.

However a layer keeps its weight, a file holds the slice as it lies in W `[N, K]`: `[N, s]` for input channels, `[s, K]`
for output channels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import channels, ops, targets
from ..adapter_files import KEY_PREFIX, AdapterFiles
from ..channels import Permutation, Slice, Structure
from ..channels.layers import sizes_of, weight_of
from ..config import S2FTConfig
from ..nn.linear import is_transposed
from ..nn.s2ft import S2FTLinear
from ..nn.s2ft_conv1d import S2FTConv1D
from ..nn.s2ft_layer import S2FTLayer, number_of_channels, random_channels
from ..nn.swiglu_mlp import swiglu_obstacle
from .base import Built, Choices, Family

TRAINABLE = "s2ft_trainable"
"""By which a file calls a trained slice, behind its layer's path."""
INDICES = {"input": "s2ft_input_indices", "output": "s2ft_output_indices"}
"""By which it calls the slice's channels, by their dim."""


_BY_DATA = ("activation", "weight_activation", "gradient")


class _S2FT(Family):
    name = "s2ft"
    config_type = S2FTConfig
    layer_type = S2FTLinear

    @property
    def layer_types(self) -> tuple[type[nn.Module], ...]:
        return (S2FTLinear, S2FTConv1D)

    def adapts(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or is_transposed(module)

    def drop_in(self, module: nn.Module) -> type[S2FTLayer]:
        return S2FTConv1D if is_transposed(module) else S2FTLinear

    def resolved(self, model: nn.Module, config: S2FTConfig) -> S2FTConfig:
        """With the layers that the roles mean as target_modules, unless those are given."""
        if config.ratios is None or config.target_modules is not None:
            return config
        structure = channels.find_structure(model)
        paths = {units.path for role in config.ratios for units in structure.units(role)}
        excluded = {path for path in paths if targets.exclusion(config, path)}
        if not paths:
            unclear = "; ".join(f"{item.path}: {item.reason}" for item in structure.not_understood[:3])
            raise ValueError(f"the model has no layers for the roles {', '.join(config.ratios)}: {unclear}")
        if paths == excluded:
            raise ValueError(
                f"exclude_modules and modules_to_save leave no layer for the roles {', '.join(config.ratios)}; these "
                f"have {', '.join(sorted(paths)[:5])}"
            )
        return replace(config, target_modules=sorted(paths - excluded))

    def uses_calibration(self, config: S2FTConfig) -> bool:
        return config.selection in _BY_DATA

    def obstacle(self, linear: nn.Module, shared: bool) -> str | None:
        reason = self.drop_in(linear).obstacle(linear)
        if reason is None and shared:
            return "its weight is another module's too, which a slice in it would change as well"
        return reason

    def build(self, model: nn.Module, config: S2FTConfig, linears: Mapping[str, nn.Module], choices: Choices) -> Built:
        slices = _given(linears, choices.positions) if choices.positions is not None else None
        if slices is None and config.ratios is None:
            generator = choices.generator if config.seed is None else torch.Generator().manual_seed(config.seed)
            slices = {path: _channels_of(linear, config, generator) for path, linear in linears.items()}
        structure, notes = _structure(model, config)
        if slices is None:
            slices = _selected(model, config, linears, choices, structure)
        permutation = None
        if config.co_permute and slices:
            permutation = channels.co_permute(model, slices, structure)
            slices = permutation.slices
        try:
            _check_trained_beside(model, config, permutation)
            layers = {
                path: self.drop_in(linears[path]).over(
                    linears[path],
                    part.indices.to(linears[path].weight.device),
                    part.dim,
                    adapter_dtype=None if choices.autocast_adapter_dtype else linears[path].weight.dtype,
                )
                for path, part in slices.items()
            }
            for path, layer in layers.items():
                order = _order_of(permutation, path, layer)
                layer.order = None if order is None else order.to(layer.indices.device, copy=True)
            mlps: dict[str, tuple[str, str, str]] = {}
            if config.fuse_swiglu:
                mlps, more = _swiglu_mlps(model, layers, structure)
                notes += more
        except BaseException:
            if permutation is not None:
                permutation.undo(model)
            raise
        return Built(layers, permutation, mlps, notes)

    def parameters(self, layer: S2FTLayer) -> tuple[nn.Parameter, ...]:
        return (layer.trainable,)

    def tensors(self, path: str, layer: S2FTLayer) -> dict[str, Tensor]:
        indices, trainable = layer.indices, layer.trainable
        if layer.order is not None:  # in the order that the channels had when the model was loaded
            indices, places = layer.order.to(indices.device)[indices].sort()
            gather = getattr(trainable, "full_tensor", None)  # of a sharded one, for which every rank takes part
            whole = trainable if gather is None else gather()
            trainable = whole.detach().index_select(layer.axis, places)
        return {f"{path}.{TRAINABLE}": layer.oriented(trainable), f"{path}.{INDICES[layer.dim]}": indices}

    def described(self, layers: Mapping[str, S2FTLayer], every_path: Collection[str]) -> S2FTConfig:
        shares = [layer.num_channels / max(1, layer.channels) for layer in layers.values()]
        return S2FTConfig(
            ratio=max([*shares, 1e-6]),
            dim=next(iter(layers.values())).dim,
            target_modules=targets.names_for(layers, every_path),
        )

    def positions_in(self, files: AdapterFiles) -> dict[str, Slice]:
        found: dict[str, Slice] = {}
        for dim, name in INDICES.items():
            for key, tensor in files.tensors.items():
                if key.endswith(f".{name}"):
                    path = key.removeprefix(KEY_PREFIX).removesuffix(f".{name}")
                    if path in found:
                        raise ValueError(f"{path} in {files.directory} has both input and output channels")
                    try:
                        found[path] = Slice(tensor, dim)  # type: ignore[arg-type]
                    except ValueError as error:
                        raise ValueError(f"{path} in {files.directory}: {error}") from None
        return found

    def check_function(self, config: S2FTConfig, layers: Mapping[str, S2FTLayer], files: AdapterFiles) -> None:
        for path, part in self.positions_in(files).items():
            try:
                ops.check_channels(part.indices, layers[path].channels)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path} in {files.directory}: {error}") from None

    def load(self, path: str, layer: S2FTLayer, tensors: Mapping[str, Tensor]) -> None:
        device = layer.weight.device
        indices = tensors[f"{KEY_PREFIX}{path}.{INDICES[layer.dim]}"].to(device)
        trainable = layer.oriented(tensors[f"{KEY_PREFIX}{path}.{TRAINABLE}"].to(device))
        if layer.order is not None:
            indices, places = layer.order.to(device).argsort()[indices].sort()
            trainable = trainable.index_select(layer.axis, places)
        layer.set_slice(indices, trainable)


def _given(linears: Mapping[str, nn.Module], positions: Mapping[str, Any]) -> dict[str, Slice]:
    """The slices that `inject` was given, or that a file names."""
    for path, part in positions.items():
        if not isinstance(part, Slice):
            raise TypeError(f"positions must be channels.Slice objects, got {type(part).__name__} for {path}")
        if path not in linears:
            raise ValueError(f"positions must be given for adapted layers only: {path}")
        outputs, inputs = sizes_of(linears[path])
        try:
            ops.check_channels(part.indices, inputs if part.dim == "input" else outputs)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None
    return dict(positions)


def _channels_of(linear: nn.Module, config: S2FTConfig, generator: torch.Generator | None) -> Slice:
    """A share of one layer's channels, whatever part it plays."""
    axis = 1 if config.dim == "input" else 0
    weight = weight_of(linear)
    total = weight.shape[axis]
    count = number_of_channels(total, config.ratio, None)
    if config.selection == "random":
        return Slice(random_channels(total, count, generator), config.dim)
    norms = torch.linalg.vector_norm(weight.float(), dim=1 - axis)
    order = norms.sort(stable=True, descending=config.largest).indices
    return Slice(order[:count].sort().values.cpu(), config.dim)


def _structure(model: nn.Module, config: S2FTConfig) -> tuple[Structure, tuple[str, ...]]:
    """The model's structure, and what the report should say of it.

    Names and shapes are enough to choose channels by. Before any are moved, a language model is asked whether it
    computes what they promise.
    """
    structure = channels.find_structure(model)
    if not config.co_permute:
        return structure, ()
    getter = getattr(model, "get_input_embeddings", None)
    embeddings = getter() if callable(getter) else None
    if not isinstance(embeddings, nn.Embedding):
        return structure, ("co-permuted by names and shapes: the model has no input embeddings to be tried out with",)
    tokens = torch.arange(4, device=embeddings.weight.device)[None] % embeddings.num_embeddings
    return channels.confirm_structure(model, {"input_ids": tokens}, structure), ()


def _selected(
    model: nn.Module,
    config: S2FTConfig,
    linears: Mapping[str, nn.Module],
    choices: Choices,
    structure: Structure,
) -> dict[str, Slice]:
    """Heads and channels by role."""
    assert config.ratios is not None
    statistics: dict[str, Any] = {}
    if config.selection in _BY_DATA:
        if choices.calibration is None:
            raise ValueError(f"selection={config.selection!r} needs batches as calibration, got None")
        if config.selection == "gradient":
            statistics["gradients"] = channels.collect_gradients(model, choices.calibration, structure)
        else:
            statistics["activations"] = channels.collect_activations(model, choices.calibration, structure)
    seed = config.seed
    if seed is None:
        seed = int(torch.randint(2**48, (), generator=choices.generator, device="cpu"))
    found = channels.select(
        model,
        config.ratios,
        selection=config.selection,
        largest=config.largest,
        seed=seed,
        budget=config.budget,
        coupled=config.co_permute,
        layers=tuple(path for path in linears if path in structure.roles()),
        structure=structure,
        **statistics,
    )
    return found.slices


def _swiglu_mlps(
    model: nn.Module, layers: Mapping[str, S2FTLayer], structure: Structure
) -> tuple[dict[str, tuple[str, str, str]], tuple[str, ...]]:
    """The MLPs whose activation can write what their last layer trains, and why others cannot."""
    found: dict[str, tuple[str, str, str]] = {}
    reasons: dict[str, list[str]] = {}
    for mlp in structure.mlps:
        layer = layers.get(mlp.output)
        if layer is None or layer.dim != "input":
            continue
        if not mlp.path:
            reasons.setdefault("it is the whole model, whose place nothing can take", []).append("the model")
            continue
        names = [path.removeprefix(f"{mlp.path}.") for path in (span.path for span in mlp.inputs)]
        names.append(mlp.output.removeprefix(f"{mlp.path}."))
        if len(set(names)) != 3 or any("." in name for name in names):
            reasons.setdefault("it has no gate and up layer of its own", []).append(mlp.path)
            continue
        gate, up, down = names
        reason = swiglu_obstacle(model.get_submodule(mlp.path), gate, up, down)
        if reason is None:
            found[mlp.path] = gate, up, down
        else:
            reasons.setdefault(reason, []).append(mlp.path)
    notes = [f"{len(found)} MLPs run with a fused SwiGLU"] if found else []
    for reason, paths in reasons.items():
        notes.append(f"{len(paths)} MLPs, {paths[0]} first, run without a fused SwiGLU: {reason}")
    return found, tuple(notes)


def _check_trained_beside(model: nn.Module, config: S2FTConfig, permutation: Permutation | None) -> None:
    """Raises where biases or whole layers train in channels that have moved: a file holds these as they lie."""
    for path, order in () if permutation is None else permutation.orders.items():
        has_bias = order.rows is not None and model.get_submodule(path)._parameters.get("bias") is not None
        option = 'bias="all"' if config.bias == "all" and has_bias else None
        if targets.exclusion(replace(config, exclude_modules=None), path):
            option = "modules_to_save"
        if option is not None:
            raise ValueError(f"co_permute moves channels of {path}, and {option} trains it beside its slice; give one")


def _order_of(permutation: Permutation | None, path: str, layer: S2FTLayer) -> Tensor | None:
    """By a channel's place, its number in the model as it was loaded; None where nothing has moved."""
    order = None if permutation is None else permutation.orders.get(path)
    if order is None:
        return None
    return order.columns if layer.dim == "input" else order.rows


S2FT = _S2FT()
