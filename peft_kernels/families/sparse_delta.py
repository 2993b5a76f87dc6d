"""Sparse deltas as a family: positions and values per layer, in the files of PEFT's Super-Tuning where they fit."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .. import ops, targets
from ..adapter_files import KEY_PREFIX, AdapterFiles
from ..config import SparseDeltaConfig
from ..nn.linear import has_hooks, replaced_call, takeover_obstacle
from ..nn.merged_linear import contiguity_obstacle
from ..nn.quantized import quantized_kind
from ..nn.quantized_sparse_delta import QuantizedSparseDeltaLinear
from ..nn.rosa import RoSALinear
from ..nn.sparse_delta import SparseDeltaLinear
from .base import Built, Choices, Family

DeltaLayer = SparseDeltaLinear | QuantizedSparseDeltaLinear
_VALUES, _INDICES = "supertuning_values", "supertuning_indices"


class _SparseDelta(Family):
    name = "sparse_delta"
    config_type = SparseDeltaConfig
    layer_type = SparseDeltaLinear

    @property
    def layer_types(self) -> tuple[type[nn.Module], ...]:
        return SparseDeltaLinear, QuantizedSparseDeltaLinear

    def obstacle(self, linear: nn.Module, shared: bool) -> str | None:
        if quantized_kind(linear) is not None:
            hooks = has_hooks(linear) and "it has hooks, which are not called while its weight is made dense"
            return replaced_call(linear) or hooks or None
        reason = takeover_obstacle(linear) or contiguity_obstacle(linear)
        if reason is None and shared:
            return "its weight is another module's too, which a delta in it would change as well"
        return reason

    def build(
        self, model: nn.Module, config: SparseDeltaConfig, linears: Mapping[str, nn.Linear], choices: Choices
    ) -> Built:
        positions = choices.positions
        if positions is not None and positions.keys() != linears.keys():
            missing = sorted(linears.keys() - positions.keys()) or sorted(positions.keys() - linears.keys())
            raise ValueError(
                f"positions must be given for the adapted layers, each of them, and no other: {missing[0]}"
            )
        for path, tensor in (positions or {}).items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"positions must be tensors, got {type(tensor).__name__} for {path}")
        counts = config.counts({path: (linear.out_features, linear.in_features) for path, linear in linears.items()})
        selection: Any = "magnitude" if config.selection == "magnitude" else "random"
        layers: dict[str, DeltaLayer] = {}
        for path, linear in linears.items():
            indices = None if positions is None else positions[path].to(linear.weight.device)
            entries: dict[str, Any] = {
                "num_deltas": counts[path] if indices is None else None,
                "indices": indices,
                "generator": choices.generator,
            }
            try:
                if quantized_kind(linear) is not None:
                    if selection == "magnitude" and indices is None:
                        raise ValueError('selection "magnitude" needs a dense weight, and this one is quantised')
                    layers[path] = QuantizedSparseDeltaLinear.over(linear, **entries)
                    continue
                adapter_dtype = None if choices.autocast_adapter_dtype else linear.weight.dtype
                layers[path] = SparseDeltaLinear.over(
                    linear, selection=selection, adapter_dtype=adapter_dtype, **entries
                )
            except (TypeError, ValueError) as error:
                raise type(error)(f"{path}: {error}") from None
        return Built(layers)

    def parameters(self, layer: DeltaLayer) -> tuple[nn.Parameter, ...]:
        return (layer.values,)

    def tensors(self, path: str, layer: DeltaLayer) -> dict[str, Tensor]:
        if isinstance(layer, RoSALinear):
            raise ValueError(f"{path} is a RoSALinear, for which there is no adapter file; save its state_dict")
        return {f"{path}.{_VALUES}": layer.values, f"{path}.{_INDICES}": layer.indices}

    def described(self, layers: Mapping[str, DeltaLayer], every_path: Collection[str]) -> SparseDeltaConfig:
        return SparseDeltaConfig(
            num_deltas=max(1, sum(layer.num_deltas for layer in layers.values())),
            target_modules=targets.names_for(layers, every_path),
        )

    def file_config(
        self, config: SparseDeltaConfig, layers: Mapping[str, DeltaLayer], every_path: Collection[str]
    ) -> dict[str, Any]:
        sparsity = _common_sparsity(layers.values())
        if sparsity is None or config.bias != "none":
            return config.to_dict()
        # What PEFT's SupertuningConfig knows and no more: PEFT warns of each field that it does not.
        kept = ("modules_to_save", "task_type", "base_model_name_or_path", "revision", "inference_mode")
        return {
            **{name: getattr(config, name) for name in kept},
            "peft_type": "SUPERTUNING",
            "sparsity": sparsity,
            "target_modules": targets.names_for(layers, every_path),
            "save_precomputed_indices": True,
        }

    def file_tensors(self, files: AdapterFiles) -> AdapterFiles:
        """In order of position, which PEFT's files are not in."""
        tensors = dict(files.tensors)
        for key, indices in files.tensors.items():
            values = tensors.get(key.removesuffix(_INDICES) + _VALUES)
            if key.endswith(f".{_INDICES}") and values is not None and values.shape == indices.shape:
                tensors[key], order = indices.sort(stable=True)
                tensors[key.removesuffix(_INDICES) + _VALUES] = values[order]
        return replace(files, tensors=tensors)

    def positions_in(self, files: AdapterFiles) -> dict[str, Tensor]:
        return {
            key.removeprefix(KEY_PREFIX).removesuffix(f".{_INDICES}"): tensor
            for key, tensor in files.tensors.items()
            if key.endswith(f".{_INDICES}")
        }

    def check_function(self, config: SparseDeltaConfig, layers: Mapping[str, DeltaLayer], files: AdapterFiles) -> None:
        for path, indices in self.positions_in(files).items():
            try:
                ops.check_indices(indices, _numel(layers[path]))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path} in {files.directory}: {error}") from None

    def load(self, path: str, layer: DeltaLayer, tensors: Mapping[str, Tensor]) -> None:
        device = layer.weight.device
        key = f"{KEY_PREFIX}{path}."
        layer.set_delta(tensors[key + _INDICES].to(device), tensors[key + _VALUES].to(device))


def _numel(layer: DeltaLayer) -> int:
    """Elements of the weight; a packed one has fewer of its own."""
    return layer.in_features * layer.out_features


def _common_sparsity(layers: Collection[DeltaLayer]) -> float | None:
    """The `sparsity` from which Super-Tuning would take as many entries of every layer; None when there is none."""
    sizes = [(_numel(layer), layer.num_deltas) for layer in layers]
    if any(count == 0 for _, count in sizes):  # which PEFT refuses
        return None
    # int(numel (1 - sparsity)) = count leaves each layer an interval; any point of all of them will do.
    least = max(1.0 - (count + 1) / numel for numel, count in sizes)
    most = min(1.0 - count / numel for numel, count in sizes)
    for sparsity in (most, 0.5 * (least + most), math.nextafter(most, 0.0)):
        if 0.0 <= sparsity < 1.0 and all(int(numel * (1 - sparsity)) == count for numel, count in sizes):
            return sparsity
    return None


SPARSE_DELTA = _SparseDelta()
