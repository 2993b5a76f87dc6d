"""Serves the backend `cuda` on the CPU by simulated kernels, so that tests written for a place run there as well.

    register_simulated()
    with peft_kernels.use_backend("cuda"):    # on CPU tensors
        ...

and `Place("cpu", "cuda")` exists from then on.
"""

from __future__ import annotations

import torch

from peft_kernels import backends

from . import build

NAMESPACE = "peft_kernels_simt"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def simulated_operators() -> tuple[str, ...]:
    """The operators that have a CUDA kernel, compiled for the executor."""
    build.load()
    names = (name.removeprefix(f"{NAMESPACE}::") for name in torch._C._dispatch_get_all_op_names())
    return tuple(
        sorted(
            name
            for name in names
            if name in backends.operators()
            and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")
        )
    )


def register_simulated() -> None:
    """Registers every simulated operator as backend `cuda` of device type `cpu`."""
    for name in simulated_operators():
        function = getattr(getattr(torch.ops, NAMESPACE), name)
        backends.register(name, "cuda", backends.Registration(function, ("cpu",), DTYPES))
