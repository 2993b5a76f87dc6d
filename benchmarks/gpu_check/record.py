"""Takes the kernels that a run has verified into `backend_status.json`, which makes them a default on such GPUs."""

from __future__ import annotations

import json
from pathlib import Path

from .. import results
from .steps import FAILED

STATUS_FILE = Path(__file__).resolve().parents[2] / "peft_kernels" / "backend_status.json"


def record(directory: Path, status_file: Path = STATUS_FILE) -> int:
    """One entry per operator, backend and GPU model; a backend that a step failed on gets none.

    Returns:
        The exit status: 1 when something had to be left out for that reason.
    """
    summary = json.loads((directory / "summary.json").read_text())
    environment = summary["environment"]
    run = {
        "gpu": environment["gpu"],
        "architecture": environment["architecture"],
        "date": environment["date"],
        "commit": environment["commit"] or "unknown",
    }
    failed: dict[str, list[str]] = {}
    for step in summary["steps"]:
        if step["status"] == FAILED and step["backend"]:
            failed.setdefault(step["backend"], []).append(step["name"])
    taken = [kernel for kernel in summary["verified"] if kernel["backend"] not in failed]
    status = json.loads(status_file.read_text())
    for kernel in taken:
        runs = status["verified_on"].setdefault(kernel["operator"], {}).setdefault(kernel["backend"], [])
        runs[:] = [old for old in runs if old["gpu"] != run["gpu"]] + [run]
    results.write_atomically(status_file, json.dumps(status, indent=2) + "\n")
    print(f"recorded {len(taken)} operators on {run['gpu']} in {status_file.name}")
    for backend, names in failed.items():
        print(f"left out: {backend}, for which {', '.join(names)} failed")
    return 1 if failed else 0
