"""The steps, in the order of what matters most when time runs out.

Tests of the kernels and of the layer; the operators against the reference, which names every kernel that ran; the
tests of the `gpu` benchmark suite and its sections, each a step; the kernel tests under each tool of compute-sanitizer;
counters of the slowest kernels of a layer. The sections have but the first of their cases' time there: the second plan
gives them all of it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import metadata
from . import counters, names, sanitizer
from .steps import NOT_RUN, Command, Ended, Runner, Step
from .summary import Summary

TOTAL_SECONDS = 540.0
SHARES = {
    "tests": 105.0,
    "verify": 50.0,
    "benchmark-tests": 20.0,
    "benchmark-lora_layer": 35.0,
    "benchmark-s2ft_model": 40.0,
    "benchmark-s2ft": 15.0,
    "benchmark-sparse_delta_model": 10.0,
    "benchmark-sparse_delta": 10.0,
    "benchmark-token_elimination_model": 20.0,
    "benchmark-token_elimination": 15.0,
    "benchmark-call_overhead": 10.0,
    "coverage": 20.0,
    **{f"sanitizer-{tool}": 35.0 for tool in sanitizer.TOOLS},
    "layer": 15.0,
    "counters": 35.0,
}
"""Seconds of each step; `steps.py` says what becomes of those that a step does not need."""
BENCHMARK_SHARES = {
    "benchmark-s2ft_model": 95.0,
    "benchmark-lora_layer": 90.0,
    "benchmark-s2ft": 60.0,
    "benchmark-sparse_delta_model": 45.0,
    "benchmark-sparse_delta": 30.0,
    "benchmark-token_elimination_model": 80.0,
    "benchmark-token_elimination": 60.0,
    "benchmark-call_overhead": 20.0,
    "benchmark-delta_algebra": 60.0,
}
"""The same of the benchmarks by themselves."""
_PREFIX = "benchmark-"
_LAST_CASE_SECONDS = {
    "lora_layer": 15.0,
    "s2ft_model": 35.0,
    "s2ft": 8.0,
    "sparse_delta_model": 25.0,
    "sparse_delta": 8.0,
    "token_elimination_model": 40.0,
    "token_elimination": 8.0,
    "call_overhead": 8.0,
    "delta_algebra": 25.0,
}
"""What a section's case may take, estimated: none begins later than that before the end, so that it gets written."""
_FIRST_CASE_SECONDS = 3.0
"""Any section may begin one."""
SLOWEST = 4
"""How many kernels have their counters read."""
_ATTEMPTS = 3
Part = Callable[[Runner, Summary, Path], None]
_PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu")


def check(output: Path, seconds: float = TOTAL_SECONDS) -> int:
    """Runs every step and writes the summary after each; returns the exit status, 1 when any step failed."""
    parts = (_tests, _verify, _benchmark_tests, _benchmarks, _coverage, _sanitizer, _layer, _counters)
    return _run(output, seconds, SHARES, parts)


def benchmarks(output: Path, seconds: float = TOTAL_SECONDS) -> int:
    """The same for the sections of the `gpu` suite by themselves."""
    return _run(output, seconds, BENCHMARK_SHARES, (_benchmarks,))


def _run(output: Path, seconds: float, shares: dict[str, float], parts: Sequence[Part]) -> int:
    if not torch.cuda.is_available():
        print(f"gpu-check needs a CUDA device; torch {torch.__version__} sees none", file=sys.stderr)
        return 1
    output.mkdir(parents=True, exist_ok=True)
    log = output / "log.txt"
    log.write_text("")
    runner, summary = Runner(log, seconds, shares), Summary(_environment())
    for part in parts:
        part(runner, summary, output)
        summary.write(output)
    print(summary.markdown())
    return 0 if summary.good else 1


def _environment() -> dict[str, Any]:
    return {
        "gpu": torch.cuda.get_device_name(),
        "architecture": "sm_{}{}".format(*torch.cuda.get_device_capability()),
        "date": metadata.now(),
        **metadata.commit(),
        "packages": metadata.package_versions(),
        "system": metadata.system(torch.device("cuda")),
    }


def _tests(runner: Runner, summary: Summary, output: Path) -> None:
    layer = ("tests/lora", "tests/s2ft", "tests/sparse_delta", "tests/test_backends.py")
    # Triton's have to compile their kernels first, which may take longer than there is time: they stand apart.
    ended = runner.run(
        "tests",
        [
            Command("cuda-tests", (*_PYTEST, "tests/gpu"), backend="cuda"),
            Command("layer-tests", (*_PYTEST, *layer, "-k", "not triton"), backend="cuda"),
            Command("triton-tests", (*_PYTEST, "tests/triton", *layer, "-k", "triton"), backend="triton"),
        ],
    )
    summary.add(*(one.step() for one in ended))


def _workload(runner: Runner, step: str, workload: str, backend: str = "") -> tuple[Ended, dict[str, Any]]:
    """Runs one of workloads.py; returns what it has written, empty if it did not get there."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "result.json")
        command = (sys.executable, "-m", "benchmarks.gpu_check.workloads", workload, str(file))
        (ended,) = runner.run(step, [Command(step, command, backend=backend)])
        return ended, json.loads(file.read_text()) if file.exists() else {}


def _verify(runner: Runner, summary: Summary, output: Path) -> None:
    ended, found = _workload(runner, "verify", "verify")
    summary.verified = found.get("verified", [])
    failures = len(found.get("failures", []))
    summary.add(ended.step(note=f"{len(summary.verified)} operators verified, {failures} failures"))
    summary.kernels = found.get("kernels", [])


def _benchmark_tests(runner: Runner, summary: Summary, output: Path) -> None:
    # Tests of what measures: they take times themselves, and so have the GPU for themselves.
    (ended,) = runner.run("benchmark-tests", [Command("benchmark-tests", (*_PYTEST, "tests/benchmarks"))])
    summary.add(ended.step())


def _benchmarks(runner: Runner, summary: Summary, output: Path) -> None:
    # One process for each section: a kernel that fails can take all that follows in its process with it.
    suite = (sys.executable, "-m", "benchmarks", "--suite", "gpu", "--output", str(output / "results"))
    for step in runner.steps:
        if not step.startswith(_PREFIX) or (section := step.removeprefix(_PREFIX)) not in _LAST_CASE_SECONDS:
            continue
        limit = max(_FIRST_CASE_SECONDS, runner.limit(step) - _LAST_CASE_SECONDS[section])
        command = Command(step, (*suite, "--only", section, "--time-limit", f"{limit:.0f}"))
        (ended,) = runner.run(step, [command])
        summary.add(ended.step())
        summary.write(output)


def _coverage(runner: Runner, summary: Summary, output: Path) -> None:
    ended, found = _workload(runner, "coverage", "tests", "cuda")
    tested = found.get("kernels", [])
    library = names.of_library() if names.LIBRARY.exists() else set()
    summary.sanitizer = {"kernels": tested, "tools": {}}
    # The operators' cases are too small for some kernels.
    ran = {kernel["kernel"] for kernel in summary.kernels if kernel["backend"] == "cuda"}
    for kernel in sorted(library.union(tested) - ran):
        line: dict[str, Any] = {"kernel": kernel, "backend": "cuda", "operators": [], "launches": 0}
        summary.kernels.append({**line, "microseconds": 0.0, "ran": kernel in tested})
    count = f"{len(library.intersection(tested))} of the library's {len(library)} kernels"
    summary.add(ended.step(note=f"the sanitizer's tests run {count}"))


def _sanitizer(runner: Runner, summary: Summary, output: Path) -> None:
    program = sanitizer.program()
    if program is None:
        summary.add(Step("sanitizer", NOT_RUN, 0.0, "compute-sanitizer not found"))
        return
    for tool in sanitizer.TOOLS:
        (ended,) = runner.run(f"sanitizer-{tool}", [sanitizer.command(program, tool)])
        report = sanitizer.parse(ended.log)
        summary.sanitizer["tools"][tool] = {"errors": report.errors, "tests": report.tests}
        summary.add(sanitizer.step(ended, report))
        summary.write(output)


def _layer(runner: Runner, summary: Summary, output: Path) -> None:
    ended, found = _workload(runner, "layer", "layer")
    summary.slowest = found.get("slowest", [])
    summary.add(ended.step())


def _counters(runner: Runner, summary: Summary, output: Path) -> None:
    program = counters.program()
    if program is None or not summary.slowest:
        reason = "ncu not found" if program is None else "no kernel was seen in the layer"
        summary.add(Step("counters", NOT_RUN, 0.0, reason))
        return
    kernels = [row["kernel"] for row in summary.slowest[:SLOWEST]]
    metrics: list[str] | None = list(counters.METRICS.values())
    for _ in range(_ATTEMPTS):
        assert metrics is not None
        (ended,) = runner.run("counters", [counters.command(program, kernels, metrics)])
        rows = counters.parse(ended.log)
        metrics = counters.without_unknown(ended.log, metrics)
        if rows or metrics is None:
            break
    summary.counters = [dict(row) for row in rows]
    summary.add(counters.step(ended, rows))
