"""Loads the compiled libraries and remembers why one is missing.

`_C` holds the operator schemas and the CPU kernels; `_C_cuda` the CUDA kernels, loaded only where torch itself has
CUDA (its stream lookup lives in libtorch_cuda). Both speak libtorch's stable ABI. `_host` is a pybind11 module.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch

_PACKAGE = Path(__file__).resolve().parent
_BUILD_HINT = "build it with `pip install --no-build-isolation --no-deps -e .` in the source tree"


def _load(stem: str) -> str | None:
    """Loads `peft_kernels/<stem>.so`; returns None, or the reason it is not there."""
    path = _PACKAGE / f"{stem}.so"
    if not path.exists():
        return f"{stem} is not built; {_BUILD_HINT}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{stem} does not load with torch {torch.__version__}: {error}"
    return None


def _load_cuda() -> str | None:
    if missing["_C"] is not None:
        return "_C_cuda needs _C, which defines the operators"
    if torch.version.cuda is None:
        built = "is built but " if (_PACKAGE / "_C_cuda.so").exists() else ""
        return f"_C_cuda {built}needs a torch with CUDA; this is torch {torch.__version__}"
    return _load("_C_cuda")


def _load_host() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("peft_kernels._host"), None
    except ImportError as error:
        return None, f"_host does not import ({error}); {_BUILD_HINT}"


missing: dict[str, str | None] = {}
"""Library name to None when it is loaded, else to the reason it is not."""
missing["_C"] = _load("_C")
missing["_C_cuda"] = _load_cuda()
host, missing["_host"] = _load_host()
