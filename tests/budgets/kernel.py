"""What is known of one compiled kernel, whoever compiled it: the figures that budgets are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Kernel:
    """One kernel instantiation on one architecture. Sizes in bytes, registers and stack per thread.

    Attributes:
        dynamic_shared: the most that a launch asks for, on top of `static_shared`.
        threads: of a block, at most; None where the kernel states no launch bounds.
        opcodes: how often each machine instruction occurs, modifiers included, such as `LDG.E.128`.
        loop: the same within the main loop (`main_loop.py`); empty without matrix instructions.
    """

    registers: int = 0
    stack: int = 0
    static_shared: int = 0
    dynamic_shared: int = 0
    threads: int | None = None
    opcodes: Counter[str] = field(default_factory=Counter)
    loop: Counter[str] = field(default_factory=Counter)

    @property
    def shared(self) -> int:
        """Shared memory of a block."""
        return self.static_shared + self.dynamic_shared

    def count(self, *stems: str) -> int:
        """How many instructions there are of these stems: `count("LDL")` counts `LDL` and `LDL.64`."""
        return sum(number for opcode, number in self.opcodes.items() if opcode.split(".")[0] in stems)


@dataclass
class Measurement:
    """What one compiler made of the kernels of one part, `cuda` or `triton`.

    Attributes:
        compiler: name and release, such as `nvcc 13.0`.
        kernels: kernel name to architecture (`sm_90a`) to figures.
        notes: what a reader of the figures should know.
    """

    compiler: str
    kernels: dict[str, dict[str, Kernel]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, architecture: str, kernel: Kernel) -> None:
        """Files a kernel; a second one of this name is `name, again`, so that none goes unseen."""
        while architecture in self.kernels.setdefault(name, {}):
            name = f"{name}, again"
        self.kernels[name][architecture] = kernel

    @property
    def architectures(self) -> list[str]:
        """The architectures that there is machine code for, the oldest first."""
        return in_order({architecture for found in self.kernels.values() for architecture in found})


def in_order(architectures: Iterable[str]) -> list[str]:
    """By number: sm_90a comes before sm_100."""
    return sorted(architectures, key=lambda name: (int(name.removeprefix("sm_").rstrip("af")), name))


class CannotMeasure(RuntimeError):
    """Something that the measurement needs is not on this machine; the message names it."""
