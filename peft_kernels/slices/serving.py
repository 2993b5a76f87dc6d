"""Several adapters in one batch: each row of it is computed with the adapter that it asks for.

    served = serve(model, {"math": math, "code": code})
    with served.rows(["math", None, "code"]):           # one name per sequence of the batch; None is the base model
        model(input_ids=batch)
    served.stop()

The weights stay the base model's. A row's update is a product with s channels of x, or of y, only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from ..nn.linear import is_transposed, take_over, takeover_obstacle
from ..planning import put_module, unwrapped
from .adapter import SliceAdapter, SliceUpdate


class _Rows:
    """Which adapter each sequence of the present batch asks for, shared by all layers of a model."""

    def __init__(self) -> None:
        self.batch = 0
        self.thread: int | None = None  # which has said so
        self.of: dict[str, Tensor] = {}  # by adapter, the numbers of its sequences


class ServedLayer(nn.Module):
    """A frozen linear layer to which each sequence of a batch adds the slice that it asks for.

    Shapes: x `[batch, ..., K]` to y `[batch, ..., N]`. For inference; gradients go through, but nothing trains.

    Attributes:
        updates: by name, what each adapter does to this layer.
        replaced_type: the class of the layer that was replaced, which computes y without them.
    """

    updates: dict[str, SliceUpdate]
    present: _Rows
    replaced_type: type[nn.Module]

    @classmethod
    def over(cls, linear: nn.Module, updates: Mapping[str, SliceUpdate], present: _Rows) -> Self:
        """Over an existing layer, which is not changed; changes are kept in the weight's dtype and device."""
        reason = takeover_obstacle(linear, is_transposed(linear))
        if reason is not None:
            raise TypeError(f"{cls.__name__} cannot replace this layer: {reason}")
        layer = take_over(linear, cls)
        layer.present = present
        layer.updates = dict(updates)
        layer.replaced_type = type(linear)
        for number, update in enumerate(updates.values()):
            layer.register_buffer(f"change_{number}", update.change.detach().to(linear.weight), persistent=False)
            indices = update.slice.indices.to(linear.weight.device)
            layer.register_buffer(f"indices_{number}", indices, persistent=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x `[batch, ..., K]` to `[batch, ..., N]`, each sequence with its adapter.

        Raises:
            ValueError: x has another number of sequences than `Served.rows` was told.
        """
        y: Tensor = self.replaced_type.forward(self, x)
        present = self.present
        if not present.of:
            return y
        if x.dim() < 2 or x.shape[0] != present.batch:
            _, inputs = next(iter(self.updates.values())).shape
            raise ValueError(f"x must be [{present.batch}, ..., {inputs}], as rows says, got {list(x.shape)}")
        for number, (name, update) in enumerate(self.updates.items()):
            rows = present.of.get(name)
            if rows is None:
                continue
            rows = rows.to(x.device)
            change, indices = self.get_buffer(f"change_{number}"), self.get_buffer(f"indices_{number}")
            own = x.index_select(0, rows)
            if update.axis == 1:
                y = y.index_add(0, rows, own.index_select(-1, indices) @ change.t())
            else:
                own_y = y.index_select(0, rows).index_add(-1, indices, own @ change.t())
                y = y.index_copy(0, rows, own_y)
        return y

    def stopped(self) -> nn.Module:
        """The plain layer."""
        own = [name for name in self._buffers if name.startswith(("change_", "indices_"))]
        return take_over(self, self.replaced_type, without=("updates", "present", "replaced_type", *own))


class ServedLinear(ServedLayer, nn.Linear):
    """A `ServedLayer` in the place of an `nn.Linear`."""


class ServedConv1D(ServedLayer):
    """A `ServedLayer` in the place of transformers' `Conv1D`."""


class Served:
    """A model that serves adapters side by side; see the module's example.

    Attributes:
        names: of the adapters.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, SliceAdapter]) -> None:
        self.model = model = unwrapped(model)
        self.names = tuple(adapters)
        self._present = _Rows()
        linears = {path: linear for adapter in adapters.values() for path, linear in adapter.linears(model).items()}
        layers: dict[int, ServedLayer] = {}
        for path, linear in linears.items():
            if id(linear) in layers:
                raise ValueError(f"{path} must be named by one path in all adapters, it is at several")
            updates = {name: adapter[path] for name, adapter in adapters.items() if path in adapter}
            kind = ServedConv1D if is_transposed(linear) else ServedLinear
            layers[id(linear)] = kind.over(linear, updates, self._present)
        everywhere = model.named_modules(remove_duplicate=False)
        self._places = {place: layers[id(module)] for place, module in everywhere if id(module) in layers}
        for place, layer in self._places.items():
            put_module(model, place, layer)

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within, sequence i of every batch is computed with adapter `names[i]`; None is the base model.

        Raises:
            KeyError: a name is not one of the adapters.
            RuntimeError: serving has been stopped, or another thread is inside: a model computes one batch at a time.
        """
        if not self._places:
            raise RuntimeError("serving has been stopped; serve the model again")
        unknown = {name for name in names if name is not None} - set(self.names)
        if unknown:
            raise KeyError(f"adapters are {', '.join(self.names)}, got {', '.join(sorted(unknown))}")
        thread = threading.get_ident()
        if self._present.thread not in (None, thread):
            raise RuntimeError("another thread is computing with adapters of this model; wait for it, or serve a copy")
        before = self._present.batch, self._present.of, self._present.thread
        self._present.thread = thread
        self._present.batch = len(names)
        self._present.of = {
            name: torch.tensor([i for i, asked in enumerate(names) if asked == name])
            for name in dict.fromkeys(names)
            if name is not None
        }
        try:
            yield
        finally:
            self._present.batch, self._present.of, self._present.thread = before

    def stop(self) -> None:
        """Gives the model its plain layers back."""
        linears = {id(layer): layer.stopped() for layer in self._places.values()}
        for place, layer in self._places.items():
            if self.model.get_submodule(place) is layer:
                put_module(self.model, place, linears[id(layer)])
        self._places = {}


def serve(model: nn.Module, adapters: Mapping[str, SliceAdapter]) -> Served:
    """Makes `model` able to compute with several adapters in one batch, in place; `Served.stop` undoes it.

    Args:
        model: with plain `nn.Linear` or `Conv1D` layers where adapters are.
        adapters: by name.

    Raises:
        ValueError, TypeError: there is no adapter, or a layer is missing, not plain or of another size; nothing has
            changed.
    """
    if not adapters:
        raise ValueError("adapters must not be empty")
    return Served(model, adapters)
