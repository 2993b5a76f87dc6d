"""Runs the CUDA kernels' code on the CPU with every tensor at the end of accessible memory; a crash is a finding.

`python -m tests.build.memory_end`, a process of its own because a read or write beyond a tensor ends it.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

from peft_kernels import libraries

# 252 floats fill whole 16-byte vectors, but not whole units of 8 columns.
_SHAPES = ((1, 1, 1), (5, 9, 3), (33, 256, 16), (31, 264, 17), (40, 250, 4), (6, 252, 3), (64, 512, 8))


def at_the_end_of_memory(tensor: Tensor) -> Tensor:
    """A copy whose last byte is the last one before a page that can be neither read nor written."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) + 1
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    end = (pages - 1) * mmap.PAGESIZE
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + end
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=end - size)
    return copy.view(tensor.shape).copy_(tensor)


def main() -> None:
    """All shapes and dtypes, factor plain and transposed, with dropout."""
    host = libraries.host
    assert host is not None, libraries.missing["_host"]
    for rows, columns, rank in _SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            hidden = at_the_end_of_memory(torch.randn(rows, rank))
            plain = at_the_end_of_memory(torch.randn(rank, columns).to(dtype))
            transposed = at_the_end_of_memory(torch.randn(columns, rank).to(dtype)).t()
            for factor in (plain, transposed):
                out = at_the_end_of_memory(torch.randn(rows, columns).to(dtype))
                host.cuda_lora_accumulate_(out, hidden, factor, 1.0, 0.5, (1, 2))
                assert out.isfinite().all()


if __name__ == "__main__":
    main()
