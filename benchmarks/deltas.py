"""Two deltas merged, from files to a file: time and peak memory of ours and of the dense way with full sorts.

Before anything is timed, the two results are compared; a wrong one gets no time. Peaks are those of a fresh process.

In the suite of a GPU the dense way is done there, sorts and all, and ours on the machine's CPU, as its operators have
no kernels for a GPU; peaks, of two kinds of memory then, are not taken.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from peft_kernels.deltas import DeltaFile

from . import delta_arms, memory
from .apart import run_apart
from .cases import Progress, Record, failure, run_cases
from .delta_arms import DENSE, OURS
from .harness import Arm, interleave, summarize
from .suites import DeltaCase, Suite

_PRELOADED = ["benchmarks.deltas"]
_TOLERANCE = 1e-4
"""Of PCB-Merging, whose scores take an exponential and a hyperbolic tangent: ||difference|| / ||dense result||."""


def _merge(name: str, folder: Path, case: DeltaCase, device: str) -> Path:
    return delta_arms.ours(folder, case) if name == OURS else delta_arms.dense(folder, case, device=device)


def difference(folder: Path, case: DeltaCase, device: str = "cpu") -> dict[str, float]:
    """How far apart the two results are: entries that differ at all, and the relative norm of the difference."""
    dense = load_file(delta_arms.dense(folder, case, draw_masks=False, device=device))
    squares = total = 0.0
    differing = 0
    with DeltaFile(delta_arms.ours(folder, case)) as packed:
        for name, tensor in dense.items():
            apart = packed[name].dense() - tensor
            differing += int(torch.count_nonzero(apart))
            squares += apart.double().square().sum().item()
            total += tensor.double().square().sum().item()
    return {"differing": differing, "relative_norm": (squares / total) ** 0.5 if total else squares}


def _wrong(case: DeltaCase, found: dict[str, float]) -> str | None:
    equal = found["relative_norm"] <= _TOLERANCE if case.method == "pcb" else found["differing"] == 0
    return None if equal else f"ours and the dense way differ: {found}"


def peak_here(folder: Path, name: str, case: DeltaCase) -> dict[str, int]:
    """Resident memory of this process before arm `name` runs, and its peak."""
    before, peak = memory.peak_resident_bytes(lambda: _merge(name, folder, case, "cpu"))
    return {"resident_bytes": peak, "resident_before_bytes": before}


def measure(case: DeltaCase, suite: Suite) -> Record:
    """Everything measured about one case."""
    with tempfile.TemporaryDirectory(prefix="peft-kernels-benchmark-") as directory:
        folder = Path(directory)
        run_apart(delta_arms.make_inputs, folder, case, preload=_PRELOADED)
        device = suite.device_type
        found = run_apart(difference, folder, case, device, preload=_PRELOADED)
        wrong = _wrong(case, found)
        os.sync()  # both arms wait for the disk at their end: not for what was written before
        arms: dict[str, Record] = {DENSE: {"status": "ready"}, OURS: {"status": "ready", "errors": found}}
        if wrong is not None:
            arms[OURS] = {"status": "wrong", "reason": wrong}
        ready = [name for name, arm in arms.items() if arm["status"] == "ready"]
        timed = [Arm(name, partial(_timed, name, folder, case, device)) for name in ready]
        times = summarize(interleave(timed, suite.delta_plan), (DENSE,))
        for name in ready:
            arms[name].update(times[name], status="measured")
            if device != "cpu":
                continue
            try:
                arms[name]["memory"] = run_apart(peak_here, folder, name, case, preload=_PRELOADED)
            except Exception as error:
                arms[name]["memory"] = failure(error)
        _add_shares(arms)
        sizes = {path.stem: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    return {"arms": arms, "file_bytes": sizes}


def _timed(name: str, folder: Path, case: DeltaCase, device: str, _round: int) -> Path:
    return _merge(name, folder, case, device)


def _add_shares(arms: dict[str, Record]) -> None:
    """What ours needs at its peak as a share of the dense way: all of the process, and what the work adds to it."""
    ours, dense = (arms[name].get("memory", {}) for name in (OURS, DENSE))
    if "resident_bytes" in ours and "resident_bytes" in dense:
        ours["share_of_dense"] = ours["resident_bytes"] / dense["resident_bytes"]
        added = [taken["resident_bytes"] - taken["resident_before_bytes"] for taken in (ours, dense)]
        ours["added_share_of_dense"] = added[0] / added[1] if added[1] > 0 else None


def run(suite: Suite, progress: Progress) -> Record:
    """All delta cases of `suite`."""
    settings = {name: getattr(delta_arms, name) for name in ("DROP", "KEEP", "BETA", "GAMMA", "COUNT")}
    train_info: Record = {
        "settings": {name.lower(): value for name, value in settings.items()},
        "devices": {DENSE: suite.device_type, OURS: "cpu"},
    }
    return run_cases(suite.deltas, lambda case: measure(case, suite), describe, progress, train_info)


def describe(record: Record) -> str:
    """One line: seconds of both, how many times faster ours is, and its share of the peak memory."""
    case, arms = record["case"], record["arms"]
    label = f"{case['method']} {case['model']} {case['dtype']} density {case['density']:.0%}"
    ours, dense = arms[OURS], arms[DENSE]
    if ours["status"] != "measured":
        return f"{label}: {ours['status']}: {ours['reason']}"
    ratio = 1.0 / ours["relative_to"][DENSE]["median_of_ratios"]
    share = ours.get("memory", {}).get("share_of_dense")
    memory_text = "" if share is None else f", {share:.2f} of its peak memory"
    return f"{label}: {dense['median_s']:.2f} s, ours {ours['median_s']:.2f} s, {ratio:.1f} times faster{memory_text}"
