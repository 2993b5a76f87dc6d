"""How many blocks of a kernel a multiprocessor holds at once, as registers, threads and shared memory allow.

"CUDA C++ Programming Guide", technical specifications per compute capability, and the rules of allocation that
`cuda_occupancy.h` of the CUDA toolkit states.
"""

from __future__ import annotations

from dataclasses import dataclass

from .kernel import Kernel

REGISTERS = 64 * 1024
"""Of a multiprocessor, on every architecture here."""

RESERVED_SHARED = 1024
"""Bytes of shared memory per block that the system takes."""

_PARTITIONS, _REGISTER_UNIT, _SHARED_UNIT, _LANES = 4, 256, 128, 32


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks on one multiprocessor share."""

    shared: int
    warps: int
    blocks: int

    @property
    def block_shared(self) -> int:
        """The most shared memory that one block may use."""
        return self.shared - RESERVED_SHARED


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(shared=164 * 1024, warps=64, blocks=32),
    "sm_86": Multiprocessor(shared=100 * 1024, warps=48, blocks=16),
    "sm_89": Multiprocessor(shared=100 * 1024, warps=48, blocks=24),
    "sm_90": Multiprocessor(shared=228 * 1024, warps=64, blocks=32),
    "sm_100": Multiprocessor(shared=228 * 1024, warps=64, blocks=32),
    "sm_120": Multiprocessor(shared=100 * 1024, warps=48, blocks=24),
}


def multiprocessor(architecture: str) -> Multiprocessor | None:
    """That of `sm_90` and `sm_90a` alike; None where the table has no line for it."""
    return MULTIPROCESSORS.get(architecture.rstrip("af"))


def static_shared(reported: int, architecture: str) -> int:
    """What a kernel declares: from Hopper on, the tools count the reserved memory of kernels that use any."""
    number = int(architecture.removeprefix("sm_").rstrip("af"))
    return max(0, reported - RESERVED_SHARED) if number >= 90 else reported


def blocks(kernel: Kernel, architecture: str) -> int | None:
    """Blocks on a multiprocessor at once; None where threads or architecture are unknown."""
    limits = multiprocessor(architecture)
    if limits is None or kernel.threads is None:
        return None
    warps = _up(kernel.threads, _LANES) // _LANES
    # Registers belong to a quarter of the multiprocessor, as warps do.
    registers = max(_up(kernel.registers * _LANES, _REGISTER_UNIT), _REGISTER_UNIT)
    by_registers = REGISTERS // _PARTITIONS // registers * _PARTITIONS // warps
    if registers * _up(warps, _PARTITIONS) > REGISTERS:  # what the hardware checks at the launch
        by_registers = 0
    by_shared = limits.shared // _up(kernel.shared + RESERVED_SHARED, _SHARED_UNIT)
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
