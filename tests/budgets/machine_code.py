"""Reads kernels out of a cubin or a library with cuobjdump: nothing is compiled again, what was built is measured.

One call per architecture prints all there is: `-elf` the launch bounds, `-res-usage` registers, stack and shared
memory, `-sass` the instructions. cuobjdump comes with Triton's wheel (newer than most toolkits) and with the toolkit.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from math import prod
from pathlib import Path

from .kernel import CannotMeasure, Kernel, in_order
from .main_loop import Instruction, main_loop
from .occupancy import static_shared

# Not what is guarded by `@!PT`: it never runs, `LDS RZ, [RZ]` of that kind is a pause between asynchronous copies.
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?!@!U?PT )(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_USAGE = re.compile(r"^ Function (\S+):\n\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.MULTILINE)
_INFO = re.compile(r"^\.nv\.info\.(\S+)\n(.*?)(?=^\.|\Z)", re.MULTILINE | re.DOTALL)
# Of __launch_bounds__ in CUDA; Triton states the exact number.
_THREADS = re.compile(r"EIATTR_(?:MAX_THREADS|REQNTID)\n.*\n\tValue:\t(0x\w+) (0x\w+) (0x\w+)")
_RELEASE = re.compile(r"Tool Version:.* release (\d+\.\d+)")


def find_cuobjdump() -> str:
    """The program; it needs nvdisasm beside it or on the path."""
    candidates = []
    try:
        import triton

        candidates.append(str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"))
    except ImportError:
        pass
    for candidate in (*candidates, "cuobjdump"):
        if found := shutil.which(candidate):
            return found
    raise CannotMeasure("needs cuobjdump, of Triton's wheel or the CUDA toolkit")


def architectures(library: Path) -> list[str]:
    """What the library holds machine code for: `["sm_80", "sm_90a"]`."""
    return in_order(set(re.findall(r"\.(sm_\w+)\.cubin", _cuobjdump("-lelf", str(library)))))


def dump(file: Path, *options: str) -> str:
    """All that cuobjdump says of a cubin, or of a library with the options `-arch sm_90a`."""
    return _cuobjdump(*options, "-elf", "-res-usage", "-sass", str(file))


def parse(text: str, architecture: str) -> dict[str, Kernel]:
    """Mangled kernel name to figures, from `dump()`."""
    threads, code = parse_threads(text), parse_code(text)
    kernels = {}
    for name, registers, stack, shared, local in _USAGE.findall(text):
        instructions = code.get(name, [])
        kernels[name] = Kernel(
            registers=int(registers),
            stack=int(stack) + int(local),
            static_shared=static_shared(int(shared), architecture),
            threads=threads.get(name),
            opcodes=Counter(instruction.opcode for instruction in instructions),
            loop=main_loop(instructions),
        )
    return kernels


def parse_release(text: str) -> str:
    """`13.0`: that of the assembler, from the note that it leaves in a cubin."""
    match = _RELEASE.search(text)
    return match.group(1) if match else "of unknown release"


def parse_threads(text: str) -> dict[str, int]:
    """Mangled name to the threads of a block, of the kernels that state them."""
    return {
        name: prod(int(size, 16) for size in found.groups())
        for name, attributes in _INFO.findall(text)
        if (found := _THREADS.search(attributes))
    }


def parse_code(text: str) -> dict[str, list[Instruction]]:
    """Mangled name to instructions."""
    code: dict[str, list[Instruction]] = {}
    instructions: list[Instruction] = []
    for line in text.splitlines():
        if found := _INSTRUCTION.match(line):
            address, opcode, operands = found.groups()
            target = _TARGET.search(operands) if opcode.startswith("BRA") else None
            instructions.append(Instruction(int(address, 16), opcode, int(target.group(1), 16) if target else None))
        elif "\tFunction : " in line:
            instructions = code[line.split("Function : ")[1].strip()] = []
    return code


def _cuobjdump(*arguments: str) -> str:
    command = (find_cuobjdump(), *arguments)
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout
