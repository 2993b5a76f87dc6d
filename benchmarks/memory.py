"""Bytes, three ways: what autograd keeps for backward, the peak of live tensor bytes, the peak of resident memory.

The first two are exact and repeatable. The third is what the operating system saw, allocator and libraries included.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Storage address to bytes; tensors that share a storage count once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _dense(tensors)}


def _dense(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """What lies in memory: of a sparse tensor (PEFT's SHiRA saves one), its indices and values."""
    for tensor in tensors:
        if tensor.layout == torch.sparse_coo:
            yield from (tensor._indices(), tensor._values())
        else:
            yield tensor


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    return sum(_storages(tensors).values())


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> tuple[int, dict[int, int]]:
    """Bytes that `forward` keeps alive for backward, storages counted once and those of `parameters` left out.

    Returns:
        (bytes, storage address to bytes of every saved storage that is not a parameter's). The addresses are valid
        while the caller keeps the inputs of `forward` alive.
    """
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.detach())  # a node that kept its own result whole would never be freed
        return packed[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    own = _storages(parameters)
    storages = {address: size for address, size in _storages(packed).items() if address not in own}
    del result
    return sum(storages.values()), storages


def peak_tensor_bytes(step: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes of tensors that were alive during `step` beyond those alive when it began.

    On the CPU from the allocation events of torch's profiler, on a GPU from the caching allocator's counters (blocks
    as requested of it, rounded to 512 bytes).
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library announces each start and stop
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    return _peak_of_events(profile)


def _peak_of_events(profile: torch.profiler.profile) -> int:
    if profile.profiler is None or profile.profiler.kineto_results is None:
        raise RuntimeError("peak_tensor_bytes: torch's profiler returned no events")
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    if not events:
        raise RuntimeError("peak_tensor_bytes: torch's profiler recorded no allocation")
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, current)
    return peak


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}; resident memory is measured on Linux only")


def release_free_memory() -> None:
    """Returns what the C allocator holds but does not use to the system (glibc; elsewhere nothing happens)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_resident_bytes(step: Callable[[], object]) -> tuple[int, int]:
    """Resident memory of this process before `step`, and its peak during it: (VmRSS, VmHWM after a reset)."""
    release_free_memory()
    _CLEAR_REFS.write_text("5")  # resets VmHWM to the present VmRSS
    before = _status_bytes("VmRSS")
    step()
    return before, _status_bytes("VmHWM")
