"""What a family of adapters must say of itself, so that whole models can be adapted, saved and loaded with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..adapter_files import KEY_PREFIX, AdapterFiles, check_tensors
from ..config import AdapterConfig


class AdapterLayer(Protocol):
    """What the drop-ins of all families have in common."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    @property
    def merged(self) -> bool: ...

    def merge(self) -> None: ...

    def unmerge(self) -> None: ...

    def to_linear(self, merge: bool) -> nn.Linear: ...


class Family(ABC):
    """One kind of adapter.

    Attributes:
        name: as the package's files are named.
        config_type: its configuration.
        layer_type: its drop-in for `nn.Linear`.
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

    @abstractmethod
    def build(
        self,
        config: Any,
        linears: Mapping[str, nn.Linear],
        generator: torch.Generator | None,
        autocast_adapter_dtype: bool,
        positions: Mapping[str, Tensor] | None,
    ) -> dict[str, Any]:
        """The drop-ins over these layers, by path; the layers are not changed.

        Args:
            config: of `config_type`.
            linears: the layers to adapt, by path.
            generator: for what is drawn at random; None means torch's default CPU generator.
            autocast_adapter_dtype: as in `inject`.
            positions: which entries of each weight to train, by path, for the families that choose entries.
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

    def positions_in(self, files: AdapterFiles) -> dict[str, Tensor] | None:
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
