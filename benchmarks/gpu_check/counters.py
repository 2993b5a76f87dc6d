"""Hardware counters of the slowest kernels, by Nsight Compute: the command, and what its table says."""

from __future__ import annotations

import csv
import re
import shutil
import sys
from collections.abc import Iterable, Sequence

from . import names
from .steps import FAILED, NOT_PERMITTED, NOT_RUN, PASSED, Command, Ended, Step

METRICS = {
    "seconds": "gpu__time_duration.sum",
    "dram_bytes_read": "dram__bytes_read.sum",
    "dram_bytes_written": "dram__bytes_write.sum",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
"""Name in the summary to the name in ncu."""
_SECONDS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1.0}

Row = dict[str, str | float | None]


def program() -> str | None:
    """The path of ncu."""
    return shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")


def command(ncu: str, kernels: Iterable[str], metrics: Iterable[str] = METRICS.values()) -> Command:
    """One step of the layer with the kernels of these bare names measured, each launch on its own."""
    functions = "|".join(sorted({names.function(kernel) for kernel in kernels}))
    options = (
        *("--csv", "--print-units", "base", "--metrics", ",".join(metrics)),
        *("--kernel-name-base", "function", "--kernel-name", f"regex:^({functions})$"),
        # The workload says where its warm-up ends; clocks are left as they are.
        *("--profile-from-start", "off", "--clock-control", "none", "--target-processes", "all"),
    )
    workload = (sys.executable, "-m", "benchmarks.gpu_check.workloads", "step")
    return Command("counters", (ncu, *options, *workload), {"LC_ALL": "C"})


def without_unknown(log: str, metrics: Sequence[str]) -> list[str] | None:
    """The metrics without one that this GPU or this ncu does not have; None where that is not what went wrong."""
    unknown = re.search(r"Failed to find metric (?:regex:\^?)?([\w.]+)", log)
    if unknown is None:
        return None
    # Printed as an expression, with `\.` for a dot or only the part before the first one.
    stem = unknown.group(1).split(".")[0]
    left = [metric for metric in metrics if metric.split(".")[0] != stem]
    return left if 0 < len(left) < len(metrics) else None


def parse(log: str) -> list[Row]:
    """One row per launch: `kernel` and the values of METRICS that ncu could tell, in base units."""
    wanted = {metric: name for name, metric in METRICS.items()}
    rows: dict[str, Row] = {}
    header: list[str] = []
    for fields in csv.reader(line for line in log.splitlines() if line.startswith('"')):
        if "Metric Name" in fields:
            header = fields
        elif len(fields) == len(header):
            cells = dict(zip(header, fields, strict=True))
            row = rows.setdefault(cells["ID"], {"kernel": names.bare(cells["Kernel Name"])})
            if name := wanted.get(cells["Metric Name"]):
                row[name] = _value(name, cells["Metric Value"], cells["Metric Unit"])
    return list(rows.values())


def _value(name: str, text: str, unit: str) -> float | None:
    try:
        value = float(text.replace(",", ""))
    except ValueError:  # "n/a"
        return None
    return value * _SECONDS.get(unit, 1e-9) if name == "seconds" else value


def step(ended: Ended, rows: Sequence[Row]) -> Step:
    """The outcome: counters that may not be read, or a profiler that does not work here, are no failure."""
    if "ERR_NVGPUCTRPERM" in ended.log:
        return ended.step(NOT_PERMITTED, "ERR_NVGPUCTRPERM: reading GPU counters needs administrator rights here")
    if unfit := re.search(r"^==ERROR== (Failed to initialize the profiler.*|.*not supported.*)$", ended.log, re.M):
        return ended.step(NOT_RUN, unfit.group(1))
    if not rows:
        return ended.step(FAILED, f"no kernel was measured, exit status {ended.code}")
    return ended.step(PASSED if ended.code == 0 else FAILED, f"{len(rows)} launches measured, exit status {ended.code}")
