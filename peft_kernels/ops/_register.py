"""Ties one family's operators to their backends; each family's module calls it once at import."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from .. import backends, libraries
from ..backends import DTYPES, Registration

GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register_operator(
    name: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: bool,
    triton: dict[str, Callable[..., Any]] | str,
    reference_devices: tuple[str, ...] = ("cpu", "cuda"),
) -> None:
    """Registers `name` with every backend it has.

    Args:
        name: operator name, as in `csrc/library.cpp`.
        reference: its plain PyTorch definition.
        fake: shape propagation for `torch.compile`, same signature.
        cuda: whether `_C_cuda` has a kernel for it.
        triton: the Triton launchers by operator name, or the reason there are none.
        reference_devices: device types the reference serves.
    """
    backends.register(name, "reference", Registration(reference, reference_devices, DTYPES))
    reason = libraries.missing["_C"]
    if reason is not None:
        backends.register(name, "cpu", Registration(None, ("cpu",), DTYPES, reason))
        backends.register(name, "triton", Registration(None, ("cuda",), GPU_DTYPES, reason))
        return
    torch.library.register_fake(f"peft_kernels::{name}", fake)
    compiled = getattr(torch.ops.peft_kernels, name).default
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"peft_kernels::{name}", "CPU"):
        backends.register(name, "cpu", Registration(compiled, ("cpu",), DTYPES))
    if cuda:
        reason = libraries.missing["_C_cuda"]
        function = compiled if reason is None else None
        backends.register(name, "cuda", Registration(function, ("cuda",), GPU_DTYPES, reason))
    _register_triton(name, triton, fake)


def fake_in_place(*_: Any) -> None:
    """The shape propagation of operators that return nothing."""


def triton_launchers(family: str) -> dict[str, Callable[..., Any]] | str:
    """The Triton launchers of a family by operator name, or the reason there are none."""
    try:
        kernels = importlib.import_module(f"peft_kernels.triton_kernels.{family}")
    except ImportError as error:
        return f"Triton kernels do not import: {error}"
    return dict(kernels.LAUNCHERS)


def _register_triton(name: str, launchers: dict[str, Callable[..., Any]] | str, fake: Callable[..., Any]) -> None:
    if isinstance(launchers, str):
        backends.register(name, "triton", Registration(None, ("cuda",), GPU_DTYPES, launchers))
        return
    if name not in launchers:
        return
    from peft_kernels.triton_kernels.common import INTERPRETING

    # Interpreted kernels work on CPU tensors; bfloat16 is wrong in Triton's interpreter, silently.
    device_types, dtypes = (("cpu",), (torch.float32, torch.float16)) if INTERPRETING else (("cuda",), GPU_DTYPES)
    schema = str(getattr(torch.ops.peft_kernels, name).default._schema).removeprefix("peft_kernels::")
    _triton_library.define(schema)
    _triton_library.impl(name, launchers[name], "CPU" if INTERPRETING else "CUDA")
    torch.library.register_fake(f"peft_kernels_triton::{name}", fake, lib=_triton_library)
    function = getattr(torch.ops.peft_kernels_triton, name).default
    backends.register(name, "triton", Registration(function, device_types, dtypes))


_triton_library = torch.library.Library("peft_kernels_triton", "DEF")
