"""The command line; see the package's text."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __doc__ as description
from . import plan, record


def main(argv: Sequence[str]) -> int:
    """Runs the check, or records one; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_check",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seconds", type=float, default=plan.TOTAL_SECONDS, help="for all steps (default: %(default)s)"
    )
    parser.add_argument(
        "--record", type=Path, metavar="DIRECTORY", help="take a finished run's kernels into the record"
    )
    parser.add_argument("--benchmarks", action="store_true", help="all of the time for the benchmark suite")
    arguments = parser.parse_args(argv)
    if arguments.record is not None:
        return record.record(arguments.record)
    if arguments.benchmarks:
        return plan.benchmarks(Path(os.environ.get("OUT") or "gpu-bench"), arguments.seconds)
    return plan.check(Path(os.environ.get("OUT") or "gpu-check"), arguments.seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
