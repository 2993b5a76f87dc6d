"""Whole chains of methods need the memory of a few tensors, however many the model has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_kernels import deltas

ROOT = Path(__file__).resolve().parents[2]
ROWS, COLUMNS, TENSORS = 1024, 1024, 24
MEGABYTE = 2**20
TENSOR = ROWS * COLUMNS * 4

CHILD = """
import sys, torch
from benchmarks.memory import peak_resident_bytes
from peft_kernels import deltas as d

torch.set_num_threads(1)
folder, name = sys.argv[1:]
def parts():
    return [d.DeltaFile(f"{folder}/delta-{i}.safetensors") for i in range(2)]
def save(delta):
    d.save_delta(delta, f"{folder}/out.safetensors")
def add():
    with d.Checkpoint(f"{folder}/base.safetensors") as base:
        d.apply_to_checkpoint(base, parts(), f"{folder}/sum.safetensors")
def subtract():
    with d.Checkpoint(f"{folder}/base.safetensors") as base, d.Checkpoint(f"{folder}/tuned.safetensors") as tuned:
        save(d.trim(d.extract(base, tuned), 0.1, scope="global"))
calls = {
    "ties": lambda: save(d.ties([d.dare(p, 0.5, seed=i) for i, p in enumerate(parts())], density=0.2, scope="global")),
    "breadcrumbs": lambda: save(d.linear([d.breadcrumbs(p, beta=0.5, gamma=0.1) for p in parts()])),
    "pcb": lambda: save(d.pcb(parts(), density=0.2)),
    "apply": add,
    "extract": subtract,
}
before, peak = peak_resident_bytes(calls[name])
print(peak - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("deltas")
    generator = torch.Generator().manual_seed(0)
    names = [f"layer.{i}" for i in range(TENSORS)]
    for i in range(2):
        spec = deltas.Spec((ROWS, COLUMNS), torch.float32, torch.float32)
        entries = {name: deltas.Entry(None, torch.randn(ROWS * COLUMNS, generator=generator), spec) for name in names}
        deltas.save_delta(deltas.SparseDelta(entries), path / f"delta-{i}.safetensors")
    for file in ("base", "tuned"):
        tensors = {name: torch.randn(ROWS, COLUMNS, generator=generator) for name in names}
        save_file(tensors, path / f"{file}.safetensors")
    return path


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "pcb", "apply", "extract"])
def test_peak_memory(folder, name):
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder), name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    # Two inputs, masks and what is packed of them, result, counters and what the heap keeps: a third of what there is.
    assert peak < 16 * TENSOR, f"{peak / MEGABYTE:.0f} MB, with tensors of {TENSOR / MEGABYTE:.0f} MB"
