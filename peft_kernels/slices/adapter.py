"""What an adapter of slices is: by layer, which channels it changes and by how much."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..channels.layers import sizes_of
from ..channels.slices import Slice
from ..nn.linear import is_plain
from ..nn.s2ft_layer import S2FTLayer
from ..planning import base_name, injection_of, unwrapped


@dataclass(frozen=True, eq=False)
class SliceUpdate:
    """What one layer's matrix W `[N, K]` gets: `W[:, indices] += change` or `W[indices, :] += change`. However a layer
    keeps W, an update is about W.

    Attributes:
        slice: the channels, and whether they are input or output channels.
        change: `[N, s]` for input channels, `[s, K]` for output channels; floating point.
        shape: of W.

    Raises:
        ValueError: change or the channels do not fit W.
    """

    slice: Slice
    change: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        indices = self.slice.indices
        expected = list(self.shape)
        expected[self.axis] = indices.numel()
        if list(self.change.shape) != expected or not self.change.is_floating_point():
            raise ValueError(
                f"change must be floating {expected}, {indices.numel()} {self.slice.dim} channels of a weight "
                f"{list(self.shape)}, got {self.change.dtype} {list(self.change.shape)}"
            )
        if indices.numel() and int(indices[-1]) >= self.shape[self.axis]:
            raise ValueError(f"indices must be below {self.shape[self.axis]}, got {int(indices[-1])}")

    @property
    def axis(self) -> int:
        """The dimension of W that channels are counted along: 1 for input channels, 0 for output channels."""
        return 1 if self.slice.dim == "input" else 0


class SliceAdapter(Mapping[str, SliceUpdate]):
    """What a model's layers get, by path. Immutable.

    Args:
        updates: by path of the layer.
        base_model: name or path of the model that it was trained on, where that is known.
    """

    def __init__(self, updates: Mapping[str, SliceUpdate], base_model: str | None = None) -> None:
        self._updates = dict(updates)
        self.base_model = base_model

    def __getitem__(self, path: str) -> SliceUpdate:
        return self._updates[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._updates)

    def __len__(self) -> int:
        return len(self._updates)

    @property
    def slices(self) -> dict[str, Slice]:
        """The channels that it changes, by path; what `channels.select` takes as `taken`."""
        return {path: update.slice for path, update in self._updates.items()}

    @property
    def numel(self) -> int:
        """How many numbers it holds, indices aside."""
        return sum(update.change.numel() for update in self._updates.values())

    def linears(self, model: nn.Module) -> dict[str, nn.Module]:
        """The plain layers of `model` that this adapter is about, by path.

        Raises:
            ValueError: a layer is missing, is no plain `nn.Linear` or `Conv1D`, or has a weight of another size.
        """
        found = {}
        for path, layer in plain_layers(model, self._updates).items():
            expected, shape = self._updates[path].shape, sizes_of(layer)
            if shape != expected:
                raise ValueError(f"{path} must have a weight {list(expected)}, as the adapter, got {list(shape)}")
            found[path] = layer
        return found

    def __repr__(self) -> str:
        channels = sum(update.slice.indices.numel() for update in self._updates.values())
        return f"SliceAdapter({len(self)} layers, {channels} channels, {self.numel} numbers)"


def plain_layers(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """The layers of `model` at these paths; raises ValueError where one is no plain `nn.Linear` or `Conv1D`."""
    modules = dict(unwrapped(model).named_modules(remove_duplicate=False))
    found = {}
    for path in paths:
        module = modules.get(path)
        if module is None or not is_plain(module):
            kind = "missing" if module is None else f"a {type(module).__name__}"
            raise ValueError(f"{path} must be a plain nn.Linear or Conv1D, it is {kind}; eject adapters first")
        found[path] = module
    return found


def taken(layer: S2FTLayer) -> SliceUpdate:
    """What one layer has been trained to, with channels as they were numbered before any co-permutation."""
    indices, change = layer.indices.cpu(), layer.change()
    if layer.order is not None:
        indices, places = layer.order.cpu()[indices].sort()
        change = change.index_select(layer.axis, places.to(change.device))
    change = layer.oriented(change).contiguous()
    return SliceUpdate(Slice(indices.clone(), layer.dim), change, (layer.out_features, layer.in_features))


@torch.no_grad()
def take(model: nn.Module) -> SliceAdapter:
    """The trained slices of a model with layers of S2FT; later training does not show in them.

    Of coupled layers that were co-permuted, slices are those of the model as it was loaded; their other dimension has
    not moved. Biases and whole modules that train beside them are left out, with a warning.

    Raises:
        ValueError: the model has no such layer.
    """
    model = unwrapped(model)
    injection = injection_of(model)
    biases = [name for name, parameter in model.named_parameters() if name.endswith("bias") and parameter.requires_grad]
    if injection is not None and (beside := [*injection.saved_modules, *biases]):
        warnings.warn(f"the slices are taken without what trains beside them: {', '.join(beside[:5])}", stacklevel=2)
    updates = {path: taken(module) for path, module in model.named_modules() if isinstance(module, S2FTLayer)}
    if not updates:
        raise ValueError("model has no S2FTLinear or S2FTConv1D layer; inject an S2FTConfig first")
    return SliceAdapter(updates, base_name(model))
