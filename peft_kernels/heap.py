"""The C library's heap, set up for training on the CPU."""

from __future__ import annotations

import ctypes
import platform

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER = -1
_GROWTH_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Makes the C library keep the memory that CPU tensors leave behind instead of handing it back to the system.

    A training step allocates and frees the same tensors every time. By default glibc returns large ones to the system,
    so that the next step gets fresh pages, which the system has to clear: up to a seventh of a step of a small model.
    Afterwards the process holds on to the most it has needed. It applies to the whole process, from now on, to any
    model; tensors on a GPU are not concerned.

    Returns:
        Whether it took effect: True with glibc, False with any other C library, where nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(
        mallopt(parameter, value) == 1
        for parameter, value in ((_TRIM_THRESHOLD, _NEVER), (_MMAP_MAX, 0), (_TOP_PAD, _GROWTH_BYTES))
    )
