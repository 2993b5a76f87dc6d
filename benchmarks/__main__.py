"""`python -m benchmarks --suite cpu|gpu|smoke [--only lora_layer,...] [--output DIR]` and `... report ...`."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import calls, deltas, lora, metadata, model, report, results, s2ft, sparse_delta, token_elimination
from .cases import Progress, Record, failures
from .gpu_suite import gpu
from .suites import SUITES, Suite

_SUITES = {**SUITES, "gpu": gpu}
BENCHMARKS: dict[str, Callable[[Suite, Progress], Record]] = {
    "lora_layer": lora.run,
    "call_overhead": calls.run,
    "lora_model": model.run_lora,
    "sparse_delta": sparse_delta.run,
    "sparse_delta_model": model.run_sparse_delta,
    "s2ft": s2ft.run,
    "s2ft_model": model.run_s2ft,
    "token_elimination": token_elimination.run,
    "token_elimination_model": model.run_token_elimination,
    "delta_algebra": deltas.run,
}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", required=True, choices=_SUITES)
    parser.add_argument("--only", help=f"comma-separated part of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--output", type=Path, help="directory for results/<device>/<suite>.json")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads, before anything runs")
    parser.add_argument(
        "--time-limit", type=float, default=float("inf"), help="seconds after which no further case begins"
    )
    arguments = parser.parse_args(argv)
    names = arguments.only.split(",") if arguments.only else list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"--only: expected some of {', '.join(BENCHMARKS)}, got {', '.join(unknown)}")
    arguments.only = [name for name in BENCHMARKS if name in names]
    return arguments


def _wanted(suite: Suite, names: Sequence[str]) -> list[str]:
    cases = {
        "lora_layer": suite.layers,
        "call_overhead": suite.calls,
        "lora_model": suite.models,
        "sparse_delta": suite.sparse,
        "sparse_delta_model": suite.sparse_models,
        "s2ft": suite.s2ft,
        "s2ft_model": suite.s2ft_models,
        "token_elimination": suite.tokens,
        "token_elimination_model": suite.token_models,
        "delta_algebra": suite.deltas,
    }
    return [name for name in names if cases[name]]


def _run(suite: Suite, name: str, path: Path, deadline: float) -> list[str]:
    """Runs one benchmark into its section of the file at `path`, with where, when and from what it was taken.

    Returns:
        One line for everything that failed.
    """
    device = torch.device(suite.device_type)
    run_info: dict[str, Any] = {"experiment_name": name, "created_at": metadata.now(), "command": metadata.command()}
    run_info.update(metadata.commit())
    meta_info = {"package_info": metadata.package_versions(), "system_info": metadata.system(device)}
    started = time.monotonic()

    def save(train_info: Record) -> None:
        run_info["total_time_s"] = round(time.monotonic() - started, 1)
        section = {"run_info": run_info, "train_info": train_info, "meta_info": meta_info}
        results.write_section(path, suite.name, name, section)

    progress = Progress(
        line=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
        save=save,
        remaining=lambda: deadline - time.monotonic(),
    )
    train_info = BENCHMARKS[name](suite, progress)
    save(train_info)
    return [f"{name}: {line}" for line in failures(train_info)]


def main(argv: Sequence[str]) -> int:
    """Runs a suite or writes reports; the exit status is 1 when anything failed."""
    if argv and argv[0] == "report":
        return report.main(argv[1:])
    arguments = _arguments(argv)
    suite = _SUITES[arguments.suite]()
    if suite.device_type == "cuda" and not torch.cuda.is_available():
        print(f"suite {suite.name} needs a CUDA device; torch {torch.__version__} sees none", file=sys.stderr)
        return 1
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    # Smoke figures are of no interest to anyone: they go where nothing is committed from.
    output = arguments.output or (Path("runs/benchmarks") if suite.name == "smoke" else results.RESULTS)
    path = results.path_of(output, metadata.slug(torch.device(suite.device_type)), suite.name)
    deadline = time.monotonic() + arguments.time_limit
    failed = []
    for name in _wanted(suite, arguments.only):
        print(name, file=sys.stderr, flush=True)
        try:
            failed += _run(suite, name, path, deadline)
        except Exception:
            failed.append(f"{name}: stopped\n{traceback.format_exc()}")
    if path.exists():
        print(report.summary(results.read(path)))
        print(f"wrote {path}")
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
