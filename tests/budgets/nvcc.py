"""What nvcc makes of `csrc/cuda/*.cu`, measured without a GPU: registers, stack, spills, shared memory, opcodes.

Each source is compiled to one cubin per architecture with the build's options and `-Xptxas -v`; opcodes come from
nvdisasm, which Triton's wheel carries where the CUDA toolkit does not. `cuda.json` beside this file holds the figures
that a change must not exceed; `python -m tests.budgets update` writes it anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

BUDGETS = Path(__file__).with_name("cuda.json")
SOURCES = Path(__file__).resolve().parents[2] / "csrc/cuda"
ARCHITECTURES = ("80", "90a", "100")
OPTIONS = (
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)


class ToolMissing(RuntimeError):
    """A program that the measurement needs is not on this machine; the message names it."""


@dataclass
class Kernel:
    """One kernel instantiation on one architecture. Sizes in bytes, stack and spills per thread.

    Attributes:
        opcodes: how often each machine instruction occurs, modifiers included, such as `LDG.E.128`.
    """

    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)


Measured = dict[str, dict[str, Kernel]]
"""Architecture (`sm_90a`) to kernel name (`accumulate_kernel<float, c10::Half>`) to figures."""


def find_nvcc() -> str:
    """The CUDA compiler the build would take: by CUDA_HOME or CUDA_PATH, on the path, or in the usual place."""
    homes = [home for variable in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(variable))]
    for candidate in (*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"):
        if found := shutil.which(candidate):
            return found
    raise ToolMissing("needs nvcc, on the path or under CUDA_HOME")


def find_nvdisasm() -> str:
    """The disassembler, from Triton's wheel (newer than most toolkits) or the path."""
    candidates = []
    try:
        import triton

        candidates.append(str(Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"))
    except ImportError:
        pass
    for candidate in (*candidates, "nvdisasm"):
        if found := shutil.which(candidate):
            return found
    raise ToolMissing("needs nvdisasm, of Triton's wheel or the CUDA toolkit")


def nvcc_release() -> str:
    """`13.0`: register counts are comparable within one release only."""
    match = re.search(r"release (\d+\.\d+)", _run(find_nvcc(), "--version"))
    assert match is not None, "nvcc --version names no release"
    return match.group(1)


def measure() -> Measured:
    """Compiles every source for every architecture, as many at a time as there are processors (about 10 s each)."""
    nvcc, nvdisasm = find_nvcc(), find_nvdisasm()
    known = _run(nvcc, "--list-gpu-code").split()
    if unknown := [arch for arch in ARCHITECTURES if f"sm_{arch.rstrip('a')}" not in known]:
        raise ToolMissing(f"needs an nvcc that knows sm_{' and sm_'.join(unknown)}; {nvcc} knows {' '.join(known)}")
    jobs = [(source, architecture) for architecture in ARCHITECTURES for source in sorted(SOURCES.glob("*.cu"))]
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: _measure_one(nvcc, nvdisasm, job[0], job[1], Path(directory)), jobs))
    measured: Measured = {}
    for (_, architecture), kernels in zip(jobs, results, strict=True):
        measured.setdefault(f"sm_{architecture}", {}).update(kernels)
    return measured


def _measure_one(nvcc: str, nvdisasm: str, source: Path, architecture: str, directory: Path) -> dict[str, Kernel]:
    cubin = directory / f"{source.stem}.sm_{architecture}.cubin"
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    include = Path(torch.__file__).parent / "include"
    command = (nvcc, *OPTIONS, target, "-cubin", "-Xptxas", "-v", "-I", str(include), str(source), "-o", str(cubin))
    kernels = parse_ptxas(_run(*command))
    for name, opcodes in parse_disassembly(_run(nvdisasm, "-c", str(cubin))).items():
        if name in kernels:
            kernels[name].opcodes = opcodes
    names = dict(zip(kernels, demangled(list(kernels)), strict=True))
    return {names[mangled]: kernel for mangled, kernel in kernels.items()}


def parse_ptxas(log: str) -> dict[str, Kernel]:
    """Mangled kernel name to the figures that `ptxas -v` printed after it."""
    kernels: dict[str, Kernel] = {}
    kernel = Kernel()
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = kernels[match.group(1)] = Kernel()
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernel.stack, kernel.spill_stores, kernel.spill_loads = (int(number) for number in match.groups())
        elif match := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(match.group(1))
            shared = re.search(r"(\d+) bytes smem", line)
            kernel.shared = int(shared.group(1)) if shared else 0
    return kernels


def parse_disassembly(text: str) -> dict[str, Counter[str]]:
    """Mangled kernel name to its opcodes, from the output of `nvdisasm -c`."""
    kernels: dict[str, Counter[str]] = {}
    opcodes: Counter[str] = Counter()
    for line in text.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            opcodes = kernels[match.group(1)] = Counter()
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            opcodes[match.group(1)] += 1
    return kernels


def demangled(names: list[str]) -> list[str]:
    """`accumulate_kernel<float, c10::Half>` for each mangled name: no parameters, no enclosing namespaces."""
    if shutil.which("c++filt") is None:
        raise ToolMissing("needs c++filt, which comes with every C++ compiler")
    lines = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    return [_bare(line) for line in lines.splitlines()]


def _bare(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w*::", "", name)
    return re.sub(r"^(?:void )?(?:\w+::)*", "", name).rsplit("(", 1)[0]


def load_budgets() -> dict[str, Any]:
    """The committed figures: `{"nvcc": release, "kernels": {architecture: {kernel: {"registers", "shared"}}}}`."""
    budgets: dict[str, Any] = json.loads(BUDGETS.read_text())
    return budgets


def update() -> None:
    """Writes the figures of this machine's nvcc as the new budgets."""
    kernels = {
        architecture: {name: {"registers": k.registers, "shared": k.shared} for name, k in sorted(found.items())}
        for architecture, found in measure().items()
    }
    BUDGETS.write_text(json.dumps({"nvcc": nvcc_release(), "kernels": kernels}, indent=2) + "\n")


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr
