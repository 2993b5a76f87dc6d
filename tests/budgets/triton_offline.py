"""What Triton makes of `triton_kernels/`, measured without a GPU: registers, spills, shared memory, opcodes.

The launchers are called on tensors without memory while `common.launch` is replaced by a recorder; each recorded launch
is then compiled ahead of time for one architecture with the specialization that Triton itself would choose for these
arguments, and the cubin is read with the tools in Triton's wheel. So the figures are those of the kernels that users'
calls run, tiles included. `triton.json` beside this file holds what a change must not exceed; `python -m tests.budgets
update triton` writes it anew.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
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

from . import triton_calls
from .nvcc import Kernel, find_nvdisasm, parse_disassembly

BUDGETS = Path(__file__).with_name("triton.json")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SHARED_MEMORY = {
    "sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024,
}  # fmt: skip
"""Architecture to the bytes of shared memory that one block may use."""

MATRIX_OPCODES = ("UTCHMMA", "HGMMA", "HMMA", "FFMA")
"""Tensor cores of Blackwell, Hopper and Ampere, and the scalar unit, the best first."""

_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int8: "i8",
}  # fmt: skip
# Figures move a little with every change of the compiler's mind; these steps are what a change may cost unnoticed.
_REGISTER_STEP, _INSTRUCTION_STEP = 8, 100


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
        patch.object(common, "shared_memory", lambda device: SHARED_MEMORY[architecture]),
    ):
        for current, call in calls.items():  # noqa: B007 - the recorder reads it
            call()
    return list(launches.values())


Measured = dict[str, dict[str, Kernel]]
"""Architecture to launch (`shrink_kernel of forward bf16 r16`) to figures."""


def measure() -> Measured:
    """Compiles every budgeted launch for every architecture: a minute of two processors, seconds once cached."""
    counts = {architecture: len(recorded(triton_calls.BUDGETED, architecture)) for architecture in ARCHITECTURES}
    jobs = [(architecture, index) for architecture, count in counts.items() for index in range(count)]
    measured: Measured = {}
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for (architecture, _), (name, kernel) in zip(jobs, pool.map(_measure_one, jobs), strict=True):
            names = measured.setdefault(architecture, {})
            names[name if name not in names else f"{name}, again"] = kernel
    return measured


def _measure_one(job: tuple[str, int]) -> tuple[str, Kernel]:
    architecture, index = job
    launch = recorded(triton_calls.BUDGETED, architecture)[index]
    compiled = launch.compile(architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        kernel = parse_usage(_run("cuobjdump", "-res-usage", file.name))
        (kernel.opcodes,) = parse_disassembly(_run("nvdisasm", "-c", file.name)).values()
    kernel.shared = compiled.metadata.shared
    return launch.name, kernel


def _run(tool: str, *arguments: str) -> str:
    path = Path(find_nvdisasm()).with_name(tool)
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def parse_usage(text: str) -> Kernel:
    """Registers and stack of the one kernel in a cubin, from `cuobjdump -res-usage`."""
    match = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert match is not None, f"no resource usage in {text!r}"
    registers, stack, local = (int(number) for number in match.groups())
    return Kernel(registers=registers, stack=stack + local)


def plain_opcodes(kernel: Kernel) -> Counter[str]:
    """Instructions without their modifiers: `HGMMA` for `HGMMA.64x256x16.F32.BF16`."""
    plain: Counter[str] = Counter()
    for opcode, count in kernel.opcodes.items():
        name = opcode.split(".")[0]
        plain["FFMA" if name == "FFMA2" else name] += count  # Blackwell's two at once
    return plain


def matrix_opcode(kernel: Kernel) -> str | None:
    """What the kernel multiplies matrices with; None when it does not."""
    found = plain_opcodes(kernel)
    # A few scalar multiply-adds are no matrix product.
    return next((opcode for opcode in MATRIX_OPCODES if found[opcode] > (32 if opcode == "FFMA" else 0)), None)


def load_budgets() -> dict[str, Any]:
    """The committed figures.

    `{"triton": version, "kernels": {architecture: {launch: {"registers", "shared", "instructions", "matrix"}}}}`.
    """
    budgets: dict[str, Any] = json.loads(BUDGETS.read_text())
    return budgets


def budget_of(kernel: Kernel) -> dict[str, Any]:
    """The figures of a kernel as a budget: rounded up to the next step, and its matrix opcode."""
    return {
        "registers": common.ceil_div(kernel.registers, _REGISTER_STEP) * _REGISTER_STEP,
        "shared": kernel.shared,
        "instructions": common.ceil_div(kernel.opcodes.total(), _INSTRUCTION_STEP) * _INSTRUCTION_STEP,
        "matrix": matrix_opcode(kernel),
    }


def differences(measured: Measured, budgets: dict[str, Any]) -> list[str]:
    """One line for each figure beyond its budget, each kernel without one, and each budget without a kernel."""
    lines = []
    for architecture in sorted({*measured, *budgets["kernels"]}):
        kernels, allowed = measured.get(architecture, {}), budgets["kernels"].get(architecture, {})
        lines += [f"{architecture} {name}: no budget" for name in kernels if name not in allowed]
        lines += [f"{architecture} {name}: no such kernel any more" for name in allowed if name not in kernels]
        for name in sorted(set(kernels) & set(allowed)):
            found = budget_of(kernels[name])
            lines += [
                f"{architecture} {name}: {figure} {found[figure]}, budget {limit}"
                for figure, limit in allowed[name].items()
                if figure != "matrix" and found[figure] > limit
            ]
            if found["matrix"] != allowed[name]["matrix"]:
                lines.append(f"{architecture} {name}: uses {found['matrix']}, expected {allowed[name]['matrix']}")
    return lines


def update() -> None:
    """Writes the figures of this machine's Triton as the new budgets; refuses kernels that spill."""
    measured = measure()
    if spilling := spills(measured):
        raise RuntimeError("kernels that spill get no budget:\n" + "\n".join(spilling))
    if BUDGETS.exists():
        print("\n".join(differences(measured, load_budgets())) or "nothing grew")
    kernels = {
        architecture: {name: budget_of(kernel) for name, kernel in sorted(found.items())}
        for architecture, found in measured.items()
    }
    BUDGETS.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=2) + "\n")


def spills(measured: Measured) -> list[str]:
    """The kernels that put anything into local memory."""
    lines = []
    for architecture, kernels in measured.items():
        for name, kernel in kernels.items():
            accesses = plain_opcodes(kernel)["LDL"] + plain_opcodes(kernel)["STL"]
            if kernel.stack or accesses:
                lines.append(f"{architecture} {name}: {kernel.stack} bytes of stack, {accesses} loads and stores of it")
    return lines
