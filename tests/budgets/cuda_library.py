"""What nvcc has made of `csrc/cuda/*.cu`, read from the library of the build: for every architecture, without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft_kernels
from benchmarks.gpu_check.names import without_parameters

from . import families, machine_code
from .kernel import CannotMeasure, Measurement

LIBRARY = Path(peft_kernels.__file__).with_name("_C_cuda.so")
SOURCES = Path(__file__).resolve().parents[2] / "csrc/cuda"


def measure() -> Measurement:
    """Every kernel of the library on every architecture that it was built for."""
    if not LIBRARY.exists():
        raise CannotMeasure(f"needs {LIBRARY.name}, which the build makes where it finds nvcc: `make build`")
    architectures = machine_code.architectures(LIBRARY)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        dumps = pool.map(lambda architecture: machine_code.dump(LIBRARY, "-arch", architecture), architectures)
        measured = Measurement("nvcc", notes=_stale())
        for architecture, text in zip(architectures, dumps, strict=True):
            measured.compiler = f"nvcc {machine_code.parse_release(text)}"
            kernels = machine_code.parse(text, architecture)
            for name, kernel in zip(demangled(list(kernels)), kernels.values(), strict=True):
                kernel.dynamic_shared = families.dynamic_shared("cuda", name, architecture)
                measured.add(name, architecture, kernel)
    return measured


def _stale() -> list[str]:
    newest = max(SOURCES.rglob("*.*"), key=lambda path: path.stat().st_mtime)
    if newest.stat().st_mtime <= LIBRARY.stat().st_mtime:
        return []
    return [f"{LIBRARY.name} is older than csrc/cuda/{newest.relative_to(SOURCES)}: `make build`"]


def demangled(names: list[str]) -> list[str]:
    """`accumulate_kernel<float, Half>` for each mangled name: the same in every build, without what is the same in all.

    Parameters and namespaces go, the anonymous one above all: its name is a hash of the source file.
    """
    if shutil.which("c++filt") is None:
        raise CannotMeasure("needs c++filt, which comes with every C++ compiler")
    lines = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    return [_bare(line) for line in lines.splitlines()]


def _bare(name: str) -> str:
    return without_parameters(re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name).removeprefix("void "))
