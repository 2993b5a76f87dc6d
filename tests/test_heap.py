"""`keep_freed_memory`: pages of freed tensors are used again, and other C libraries are left alone."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys

import pytest

import peft_kernels as pk

# In a process of its own, whose heap nothing else has touched and whose setting dies with it.
SCRIPT = """
import json, resource, sys
import torch
import peft_kernels as pk

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults(2)
default = faults(10)
took_effect = pk.keep_freed_memory()
faults(10)  # what small allocations leave of the first places may be too little for a whole tensor
json.dump({"default": default, "took_effect": took_effect, "kept": faults(10)}, sys.stdout)
"""
OTHER_ALLOCATORS = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_keeps_its_pages():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OTHER_ALLOCATORS)}
    output = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True, capture_output=True, text=True)
    found = json.loads(output.stdout)
    assert found["took_effect"] is True
    assert found["default"] >= 10 * 32, "64 MiB are 32 pages of the largest kind"
    assert found["kept"] <= found["default"] / 4


@pytest.mark.parametrize("library", [("musl", "1.2"), ("", "")], ids=["musl", "unknown"])
def test_any_other_c_library_is_left_alone(library, monkeypatch):
    def refuse(*_):
        raise AssertionError("nothing may be called")

    monkeypatch.setattr(platform, "libc_ver", lambda *_: library)
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert pk.keep_freed_memory() is False
