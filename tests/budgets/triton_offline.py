"""What Triton makes of `triton_kernels/`, measured without a GPU: registers, spills, shared memory, opcodes.

The launchers are called on tensors without memory while `common.launch` is replaced by a recorder; each recorded launch
is then compiled ahead of time for one architecture with the specialization that Triton itself would choose for these
arguments, and the cubin is read with the tools in Triton's wheel. So the figures are those of the kernels that users'
calls run, tiles included.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from peft_kernels.triton_kernels import common
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import machine_code, triton_calls
from .kernel import Kernel, Measurement
from .occupancy import MULTIPROCESSORS

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
    torch.int8: "i8",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as a launcher made it."""

    call: str
    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """`shrink_kernel of forward bf16 r16`."""
        return f"{self.kernel.__name__} of {self.call}"

    def specialized(self) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
        """Signature, constants and attributes that Triton's launcher derives from such arguments.

        A one and None become constants, tensors (which torch aligns) and multiples of 16 are marked as such.
        """
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.options[parameter.name] if parameter.is_constexpr else self.arguments[index]
            general = parameter.do_not_specialize
            aligned = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0 and not general)
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not general):
                signature[parameter.name], constants[(index,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{_TYPES[value.dtype]}"
            elif isinstance(value, int):
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            else:
                signature[parameter.name] = "fp32"
            if aligned and signature[parameter.name] != "constexpr":
                attributes[(index,)] = [["tt.divisibility", 16]]
        return signature, constants, attributes

    def compile(self, architecture: str) -> Any:
        """The compiled kernel, from Triton's cache where it is there."""
        signature, constants, attributes = self.specialized()
        names = [parameter.name for parameter in self.kernel.params]
        options = {name: value for name, value in self.options.items() if name not in names}
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options={**common.COMPILE_OPTIONS, **options})


def recorded(calls: dict[str, triton_calls.Calls], architecture: str) -> list[Launch]:
    """The launches of `calls` on a device of this architecture; of launches that compile to the same, the first."""
    launches: dict[str, Launch] = {}
    current = ""

    def record(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
        launch = Launch(current, kernel, arguments, options)
        launches.setdefault(repr((kernel.__name__, launch.specialized(), sorted(options.items()))), launch)

    with (
        patch.object(common, "launch", record),
        patch.object(common, "shared_memory", lambda device: MULTIPROCESSORS[architecture].block_shared),
    ):
        for current, call in calls.items():  # noqa: B007 - the recorder reads it
            call()
    return list(launches.values())


def measure() -> Measurement:
    """Compiles every budgeted launch for every architecture: a minute of two processors, seconds once cached."""
    counts = {architecture: len(recorded(triton_calls.BUDGETED, architecture)) for architecture in ARCHITECTURES}
    jobs = [(architecture, index) for architecture, count in counts.items() for index in range(count)]
    measured = Measurement(f"triton {triton.__version__}")
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for (architecture, _), (name, kernel) in zip(jobs, pool.map(_measure_one, jobs), strict=True):
            measured.add(name, architecture, kernel)
    return measured


def _measure_one(job: tuple[str, int]) -> tuple[str, Kernel]:
    architecture, index = job
    launch = recorded(triton_calls.BUDGETED, architecture)[index]
    compiled = launch.compile(architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (kernel,) = machine_code.parse(machine_code.dump(Path(file.name)), architecture).values()
    kernel.dynamic_shared = compiled.metadata.shared
    return launch.name, kernel
