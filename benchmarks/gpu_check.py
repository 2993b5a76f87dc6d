"""`make gpu-check`: what a machine with a GPU, torch and nvcc can confirm in under ten minutes, without a network.

    python -m benchmarks.gpu_check                      run the steps, write ./gpu-check/ (or $OUT)
    python -m benchmarks.gpu_check --record DIRECTORY   take a run's verified kernels into backend_status.json

Steps: GPU tests of kernels, then of the layer; the operators against the reference (`peft_kernels.verify`), which names
every kernel that ran; the kernel tests under each tool of compute-sanitizer; the `gpu` benchmark suite. Each step has a
time limit and its own log; a step that fails or times out does not keep the others from running. `summary.json` and
`summary.md` hold the outcome. The exit status is 1 when any step failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import metadata

STATUS_FILE = Path(__file__).resolve().parent.parent / "peft_kernels" / "backend_status.json"
TOTAL_SECONDS = 540.0
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


@dataclass
class Step:
    """One command and how it ended: `status` is passed, failed, timed out or not run (with the reason in `note`)."""

    name: str
    status: str
    seconds: float
    note: str = ""


def _run(name: str, command: list[str], output: Path, limit: float, environment: dict[str, str] | None = None) -> Step:
    """Runs a command with its output in `<name>.log`."""
    if limit < 5.0:
        return Step(name, "not run", 0.0, "no time left")
    started = time.monotonic()
    with (output / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, env={**os.environ, **(environment or {})}
            ).returncode
            status, note = ("passed", "") if code == 0 else ("failed", f"exit status {code}")
        except subprocess.TimeoutExpired:
            status, note = "timed out", f"limit {limit:.0f} s"
    step = Step(name, status, round(time.monotonic() - started, 1), note)
    print(f"{step.name}: {step.status} in {step.seconds} s {step.note}".rstrip(), flush=True)
    return step


def _verified_kernels() -> tuple[list[dict[str, str]], list[str]]:
    """The GPU kernels whose every case kept the accuracy rule on this GPU, and the failures of the others."""
    from peft_kernels.verify.check import verify

    passed: dict[tuple[str, str], bool] = {}
    failures = []
    for outcome in verify():
        if outcome.device_type != "cuda" or outcome.backend == "reference":
            continue
        key = (outcome.operator, outcome.backend)
        passed[key] = passed.get(key, True) and outcome.passed
        if not outcome.passed:
            failures.append(f"{outcome.operator} {outcome.backend} {outcome.dtype}: {outcome.failure}")
    return [{"operator": op, "backend": backend} for (op, backend), ok in passed.items() if ok], failures


def _verify(output: Path) -> tuple[Step, list[dict[str, str]]]:
    started = time.monotonic()
    kernels, failures = _verified_kernels()
    (output / "verify.log").write_text("\n".join(failures) + "\n")
    status = "failed" if failures or not kernels else "passed"
    note = f"{len(kernels)} kernels verified, {len(failures)} failures"
    step = Step("verify", status, round(time.monotonic() - started, 1), note)
    print(f"{step.name}: {step.status} in {step.seconds} s {step.note}", flush=True)
    return step, kernels


def _sanitizers(output: Path, deadline: float) -> list[Step]:
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        return [Step("sanitizer", "not run", 0.0, "compute-sanitizer not found")]
    steps = []
    for tool in SANITIZER_TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        command += [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "tests/gpu", "-k", "not graph"]
        # Without torch's caching allocator every tensor has bounds of its own that memcheck can watch.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        limit = min(45.0, deadline - time.monotonic())
        steps.append(_run(f"sanitizer-{tool}", command, output, limit, environment))
    return steps


def _environment() -> dict[str, object]:
    device = torch.device("cuda")
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return {
        "gpu": torch.cuda.get_device_name(),
        "architecture": architecture,
        "date": metadata.now(),
        **metadata.commit(),
        "packages": metadata.package_versions(),
        "system": metadata.system(device),
    }


def check(output: Path) -> int:
    """Runs every step and writes the summary; returns the exit status."""
    if not torch.cuda.is_available():
        print(f"gpu-check needs a CUDA device; torch {torch.__version__} sees none", file=sys.stderr)
        return 1
    output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + TOTAL_SECONDS
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    steps = [
        _run("kernel-tests", [*pytest, "tests/gpu", "tests/triton"], output, 100.0),
        _run("layer-tests", [*pytest, "tests/lora", "tests/test_backends.py"], output, 100.0),
    ]
    verified, kernels = _verify(output)
    steps.append(verified)
    bench = [sys.executable, "-m", "benchmarks", "--suite", "gpu", "--output", str(output / "results")]
    limit = min(200.0, deadline - time.monotonic())
    steps.append(_run("benchmarks", [*bench, "--time-limit", f"{limit - 30:.0f}"], output, limit))
    steps += _sanitizers(output, deadline)
    environment = _environment()
    summary = {"environment": environment, "steps": [asdict(step) for step in steps], "verified": kernels}
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (output / "summary.md").write_text(_markdown(environment, steps))
    print((output / "summary.md").read_text())
    return 0 if all(step.status in ("passed", "not run") for step in steps) else 1


def _markdown(environment: dict[str, object], steps: list[Step]) -> str:
    lines = [f"# GPU check on {environment['gpu']} ({environment['architecture']}), {environment['date']}", ""]
    lines += ["| step | outcome | seconds | |", "| --- | --- | --- | --- |"]
    lines += [f"| {step.name} | {step.status} | {step.seconds} | {step.note} |" for step in steps]
    return "\n".join(lines) + "\n"


def record(directory: Path) -> int:
    """Adds the kernels that a run verified to `backend_status.json`, one entry per operator, backend and GPU model."""
    summary = json.loads((directory / "summary.json").read_text())
    environment = summary["environment"]
    status = json.loads(STATUS_FILE.read_text())
    run = {
        "gpu": environment["gpu"],
        "architecture": environment["architecture"],
        "date": environment["date"],
        "commit": environment["commit"] or "unknown",
    }
    for kernel in summary["verified"]:
        runs = status["verified_on"].setdefault(kernel["operator"], {}).setdefault(kernel["backend"], [])
        runs[:] = [old for old in runs if old["gpu"] != run["gpu"]] + [run]
    STATUS_FILE.write_text(json.dumps(status, indent=2) + "\n")
    print(f"recorded {len(summary['verified'])} kernels on {run['gpu']} in {STATUS_FILE.name}")
    return 0


def main() -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument(
        "--record", type=Path, metavar="DIRECTORY", help="take a finished run's kernels into the record"
    )
    arguments = parser.parse_args()
    if arguments.record is not None:
        return record(arguments.record)
    return check(Path(os.environ.get("OUT") or "gpu-check"))


if __name__ == "__main__":
    sys.exit(main())
