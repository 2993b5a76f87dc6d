"""Which tensors of a model are used at more than one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class _Use:
    """A tensor at a place, and the bytes it reaches over."""

    name: str
    first: int
    end: int


def tied_weights(model: nn.Module) -> Callable[[str], list[str]]:
    """A function from a tensor's name to the names of those that share memory with it, at other places.

    Places are told apart by the module and the one that holds it: a layer that is found by several paths is one place,
    while a module that is both inside a PEFT layer and outside of it is two. A name that the model does not have gives
    an empty list.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    known: dict[str, tuple[object, _Use]] = {}
    uses: dict[object, dict[tuple[int, int, str], _Use]] = {}
    for path, module in modules.items():
        parent = modules[path.rpartition(".")[0]]
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            full = f"{path}.{name}" if path else name
            memory, first, end = _extent(tensor)
            place = (id(parent), id(module), name)
            use = uses.setdefault(memory, {}).setdefault(place, _Use(full, first, end))
            known[full] = memory, use

    def others(name: str) -> list[str]:
        if name not in known:
            return []
        memory, here = known[name]
        found = uses[memory].values()
        return [use.name for use in found if use is not here and use.first < here.end and here.first < use.end]

    return others


def _extent(tensor: Tensor) -> tuple[object, int, int]:
    """The memory that a tensor lies in, and its first byte there and the one after its last.

    A tensor without memory to ask for (meta, a subclass made of several) shares it with itself only.
    """
    try:
        storage, address = tensor.untyped_storage().data_ptr(), tensor.data_ptr()
    except (NotImplementedError, RuntimeError):
        storage = address = 0
    if not storage:
        return id(tensor), 0, 1
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.device, storage), address, address + (steps + 1) * tensor.element_size() * bool(tensor.numel())
