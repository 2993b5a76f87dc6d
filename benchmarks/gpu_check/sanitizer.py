"""The kernel tests under compute-sanitizer: the commands, and what its report says.

The tests marked `sanitizer` run every kernel of the library once or more on small ragged shapes. A first run of them
under the profiler says which kernels that were; then each tool has a process of its own.
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass

from . import names
from .steps import FAILED, NOT_RUN, PASSED, Command, Ended, Step

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TESTS = ("tests/gpu", "-q", "-p", "no:cacheprovider", "-m", "sanitizer")
"""Arguments of pytest."""
TOOL_VARIABLE = "PEFT_KERNELS_SANITIZER"
"""Names the tool in the environment of the tests."""

# The kernels of others are not what is checked here. initcheck has to see all, since what they write counts as written.
_OURS_ONLY = ("--kernel-name", f"kns={names.NAMESPACE}")
_OPTIONS = {
    # Every call of ours is checked where it is made; torch makes calls whose failure it expects.
    "memcheck": (*_OURS_ONLY, "--report-api-errors", "no"),
    "racecheck": _OURS_ONLY,
    "synccheck": _OURS_ONLY,
    "initcheck": (),
}
_ERROR_EXIT = "9"


@dataclass(frozen=True)
class Report:
    """What one tool found.

    Attributes:
        errors: as its summary line counts them; None when there is no summary, so nothing was checked to the end.
        tests: how many tests passed under it.
        obstacle: why it could not check this device at all, in its own words; empty when it could.
    """

    errors: int | None
    tests: int
    obstacle: str = ""


def program() -> str | None:
    """The path of compute-sanitizer."""
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def command(sanitizer: str, tool: str) -> Command:
    """The kernel tests under one tool."""
    tests = (sys.executable, "-m", "pytest", *TESTS)
    options = ("--tool", tool, "--error-exitcode", _ERROR_EXIT, "--target-processes", "all", *_OPTIONS[tool])
    # Without torch's caching allocator every tensor has bounds of its own that memcheck can watch.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", TOOL_VARIABLE: tool}
    return Command(f"sanitizer-{tool}", (sanitizer, *options, *tests), environment, backend="cuda")


def parse(log: str) -> Report:
    """Reads the log of a tool with the tests' own output in it."""
    counts = [int(n) for n in re.findall(r"=+ ERROR SUMMARY: (\d+) errors?\s*$", log, re.MULTILINE)]
    # Warnings are hazards too: write after write, or between threads of a warp without a barrier.
    counts += [int(n) for n in re.findall(r"=+ RACECHECK SUMMARY: (\d+) hazards? displayed", log)]
    passed = re.findall(r"\b(\d+) passed\b", log)
    obstacle = re.search(r"^=+.*?\b(Device not supported.*)$", log, re.MULTILINE)
    return Report(
        errors=sum(counts) if counts else None,
        tests=int(passed[-1]) if passed else 0,
        obstacle=obstacle.group(1).strip() if obstacle else "",
    )


def step(ended: Ended, report: Report) -> Step:
    """The outcome: passed only when the tool counted no error, the tests passed and the process ended well."""
    if report.obstacle:
        return ended.step(NOT_RUN, report.obstacle)
    errors = "no summary" if report.errors is None else f"{report.errors} errors"
    note = f"{errors}, {report.tests} tests passed, exit status {ended.code}"
    fine = report.errors == 0 and report.tests > 0 and ended.code == 0
    return ended.step(PASSED if fine else FAILED, note)
