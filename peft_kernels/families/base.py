"""What a family of adapters must say of itself, so that whole models can be adapted, saved and loaded with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..adapter_files import KEY_PREFIX, AdapterFiles, check_tensors
from ..channels import Permutation
from ..config import AdapterConfig


class AdapterLayer(Protocol):
    """What the drop-ins of all families have in common."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    @property
    def merged(self) -> bool: ...

    def merge(self) -> None: ...

    def unmerge(self) -> None: ...

    def to_linear(self, merge: bool) -> nn.Module: ...


@dataclass(frozen=True)
class Choices:
    """What decides, beside the configuration, which part of each weight trains and from where it starts.

    Attributes:
        generator: for what is drawn at random; None means torch's default CPU generator.
        autocast_adapter_dtype: as in `inject`.
        positions: which part of each weight trains, by path, for the families that choose one; None leaves the choice
            to the configuration.
        calibration: batches that a choice may be made by, as keyword arguments of the model.
    """

    generator: torch.Generator | None = None
    autocast_adapter_dtype: bool = True
    positions: Mapping[str, Any] | None = None
    calibration: Iterable[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Built:
    """What a family makes of a model.

    Attributes:
        layers: the drop-ins by path, for the layers that got one.
        permutation: how channels of the model were moved for them; None where they were not.
        mlps: by path, the names of the gate, up and down layers of MLPs that can run as a `SwiGLUMLP`.
        notes: what the report should say beside.
    """

    layers: dict[str, Any]
    permutation: Permutation | None = None
    mlps: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Family(ABC):
    """One kind of adapter.

    Attributes:
        name: as the package's files are named.
        config_type: its configuration.
        layer_type: its drop-in for `nn.Linear`, the first of those it has.
        layer_types: all its drop-ins.
    """

    name: str
    config_type: type[AdapterConfig]
    layer_type: type[nn.Linear]

    @property
    def layer_types(self) -> tuple[type[nn.Module], ...]:
        return (self.layer_type,)

    @abstractmethod
    def obstacle(self, linear: nn.Module, shared: bool) -> str | None:
        """Why the drop-in cannot replace this module; None when it can.

        Args:
            linear: any module.
            shared: whether another module of the model has the same weight.
        """

    def adapts(self, module: nn.Module) -> bool:
        """Whether this module is of a kind that the family has a drop-in for, whatever may be in the way."""
        return isinstance(module, nn.Linear)

    def drop_in(self, module: nn.Module) -> Any:
        """The class of the drop-in for this module."""
        return self.layer_type

    def resolved(self, model: nn.Module, config: Any) -> Any:
        """The configuration with what it leaves to the model's structure spelled out."""
        return config

    def uses_calibration(self, config: Any) -> bool:
        """Whether a choice with this configuration goes by batches of data."""
        return False

    @abstractmethod
    def build(self, model: nn.Module, config: Any, linears: Mapping[str, Any], choices: Choices) -> Built:
        """The drop-ins over these layers; the layers are not changed, but perhaps permuted, by a configuration that
        asks for it. Raises before anything is.

        Args:
            model: where the layers are.
            config: of `config_type`.
            linears: the layers to adapt, by path.
            choices: what the configuration does not say.
        """

    @abstractmethod
    def parameters(self, layer: Any) -> tuple[nn.Parameter, ...]:
        """What trains in a layer."""

    @abstractmethod
    def tensors(self, path: str, layer: Any) -> dict[str, Tensor]:
        """A layer's part of the adapter's file, by key without PEFT's prefix: the live tensors."""

    @abstractmethod
    def described(self, layers: Mapping[str, Any], every_path: Collection[str]) -> Any:
        """The configuration of a model built by hand from such layers."""

    def file_config(self, config: Any, layers: Mapping[str, Any], every_path: Collection[str]) -> dict[str, Any]:
        """The contents of `adapter_config.json` for layers that were injected with `config`."""
        return config.to_dict()  # type: ignore[no-any-return]

    def file_tensors(self, files: AdapterFiles) -> AdapterFiles:
        """A file's tensors as our layers hold them."""
        return files

    def positions_in(self, files: AdapterFiles) -> Mapping[str, Any] | None:
        """The `positions` that `build` takes, from a file."""
        return None

    @abstractmethod
    def check_function(self, config: Any, layers: Mapping[str, Any], files: AdapterFiles) -> None:
        """Raises ValueError when the file's tensors would compute something else in these layers."""

    def check_tensors(self, files: AdapterFiles, expected: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless the file fits the tensors that it is to be copied into."""
        check_tensors(files, expected)

    def load(self, path: str, layer: Any, tensors: Mapping[str, Tensor]) -> None:
        """Copies a file's checked tensors into a layer."""
        for key, tensor in self.tensors(path, layer).items():
            tensor.copy_(tensors[KEY_PREFIX + key])
