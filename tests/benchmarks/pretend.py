"""A device that is not there: its tensors hold those of the CPU, and refuse to meet tensors that were left on the CPU.

What runs on it has put everything where it belongs, as far as a machine without a GPU can tell. As on a GPU, tensors of
no dimension may stay on the CPU, and so may indices; `copy_` and `to` cross over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Module(_DummyBackendModule):
    """`torch.pretend`: random numbers come from the CPU's generator."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


_setup_privateuseone_for_python_backend("pretend", _Module())
DEVICE = torch.device("pretend:0")

_aten = torch.ops.aten
_CROSSING = {_aten.copy_.default, _aten._to_copy.default, _aten._copy_from.default, _aten.lift_fresh.default}
_INDEXED = {
    *(_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default),
    *(_aten._index_put_impl_.default, _aten._unsafe_index.Tensor),
}


class PretendTensor(Tensor):
    """A tensor of the device; `on_cpu` is what it holds."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> PretendTensor:  # type: ignore[misc]
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=DEVICE,
        )
        made.on_cpu = on_cpu
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _inner(value: Any) -> Any:
    return value.on_cpu if isinstance(value, PretendTensor) else value


def _check(func: Any, args: Any, kwargs: Any) -> None:
    if func in _CROSSING:
        return
    # Of indexing, what is indexed and what is put there count, and indices where they are the device's.
    counted: Any = (args, kwargs)
    if func in _INDEXED:
        counted = (args[0], *args[2:], [value for value in args[1] if isinstance(value, PretendTensor)])
    tensors = [value for value in tree_flatten(counted)[0] if isinstance(value, Tensor)]
    theirs = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    left = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor) and tensor.dim() > 0]
    if theirs and left:
        raise RuntimeError(f"{func}: {list(left[0].shape)} is on {left[0].device}, others on {DEVICE}")


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    _check(func, args, kwargs)
    flat = tree_flatten((args, kwargs))[0]
    here = any(isinstance(value, PretendTensor) for value in flat)
    asked = kwargs.get("device")
    to_here = torch.device(asked).type == DEVICE.type if asked is not None else here and func is not _aten.item.default
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    given = {id(value.on_cpu): value for value in flat if isinstance(value, PretendTensor)}
    given |= {id(value): value for value in flat if isinstance(value, Tensor) and not isinstance(value, PretendTensor)}

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, PretendTensor):
            return value
        if id(value) in given:  # changed in place
            return given[id(value)]
        return PretendTensor(value) if to_here else value

    return tree_map(outer, result)


class _Factories(TorchDispatchMode):
    """Makes tensors that are asked for on the device, from nothing or from the CPU's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def device() -> Iterator[torch.device]:
    """The device, while it can be used."""
    with _Factories():
        yield DEVICE
