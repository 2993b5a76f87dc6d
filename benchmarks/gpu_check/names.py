"""Kernel names: `shrink_kernel<BFloat16, 16>`, whichever tool has printed the name, and those that the library has."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import peft_kernels

LIBRARY = Path(peft_kernels.__file__).with_name("_C_cuda.so")
NAMESPACE = "peft_kernels"
"""Part of the name of every CUDA kernel of ours, mangled or not, and of no one else's."""

_QUALIFIER = re.compile(r"\(anonymous namespace\)::|<unnamed>::|\b\w+::")
_CAST = re.compile(r"\((?:unsigned |signed )?(?:int|long|short|char|bool)\)")
_KERNEL = re.compile(r"(void )?peft_kernels::\(anonymous namespace\)::\w+_kernel(<.*>)?\(")


def bare(name: str) -> str:
    """The name without what is the same in all or differs from build to build and from tool to tool.

    Return type, namespaces (the anonymous one is a hash of the source file), parameters, and the types that profilers
    print before integers go.
    """
    if name.startswith("_Z"):
        name = torch._C._demangle(name)
    return without_parameters(_CAST.sub("", _QUALIFIER.sub("", name)).removeprefix("void "))


def without_parameters(name: str) -> str:
    """A demangled name up to where its parameters begin; template arguments can have parentheses too."""
    if not name.endswith(")"):
        return name
    depth = 0
    for place in range(len(name) - 1, -1, -1):
        depth += (name[place] == ")") - (name[place] == "(")
        if depth == 0:
            return name[:place]
    return name


def function(kernel: str) -> str:
    """A bare name without its template arguments."""
    return kernel.partition("<")[0]


def of_library(library: Path = LIBRARY) -> set[str]:
    """The bare names of all CUDA kernels of the compiled library, from the names it registers them under."""
    found = {match.decode() for match in re.findall(rb"_ZN\w+", library.read_bytes()) if b"_kernel" in match}
    return {bare(name) for name in map(torch._C._demangle, found) if _KERNEL.match(name)}


def of_triton() -> set[str]:
    """The names of all Triton kernels; empty where Triton does not import."""
    try:
        from peft_kernels.triton_kernels import common, lora_kernels, s2ft_kernels, sparse_delta_kernels
    except ImportError:
        return set()
    modules = (common, lora_kernels, s2ft_kernels, sparse_delta_kernels)
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}
