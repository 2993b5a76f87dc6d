"""What runs on the GPU for the check, as processes: `python -m benchmarks.gpu_check.workloads NAME [FILE]`.

    verify FILE    the operators against the reference, and which kernels each runs
    tests FILE     the tests that the sanitizer will run, and which kernels they run
    layer FILE     a layer's forward and backward, and how long its kernels take
    step           the same once, after a warm-up, for a profiler that starts with cudaProfilerStart

Results go to FILE as JSON. Kernels are seen by torch.profiler.
"""

from __future__ import annotations

import itertools
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import peft_kernels
from peft_kernels import backends
from peft_kernels.verify.check import FAMILIES, verify

from . import names, sanitizer

M, K, N, RANK = 8192, 4096, 4096, 16
STEPS = 5


def launches(run: Callable[[], object]) -> list[tuple[str, float]]:
    """The kernels of ours that `run` starts, in order: bare name and microseconds on the GPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    triton = names.of_triton()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return [
        (names.bare(event.name), event.time_range.elapsed_us())
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and (names.NAMESPACE in event.name or event.name in triton)
    ]


def totals(found: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """Per kernel: how often it ran, and microseconds in all; the slowest first."""
    rows: dict[str, dict[str, Any]] = {}
    for kernel, microseconds in found:
        row = rows.setdefault(kernel, {"kernel": kernel, "launches": 0, "microseconds": 0.0})
        row["launches"] += 1
        row["microseconds"] += microseconds
    for row in rows.values():
        row["microseconds"] = round(row["microseconds"], 2)
    return sorted(rows.values(), key=lambda row: -row["microseconds"])


def merged(by_operator: dict[tuple[str, str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One line per backend and kernel, with all operators that ran it, from the totals of each (backend, operator)."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for (backend, operator), rows in by_operator.items():
        for row in rows:
            empty = {"kernel": row["kernel"], "backend": backend, "operators": [], "launches": 0, "microseconds": 0.0}
            line = lines.setdefault((backend, row["kernel"]), {**empty, "ran": True})
            line["operators"].append(operator)
            line["launches"] += row["launches"]
            line["microseconds"] = round(line["microseconds"] + row["microseconds"], 2)
    return [lines[key] for key in sorted(lines)]


def _calls(operator: str, backend: str) -> Iterator[Callable[[], object]]:
    """All cases that `verify` has for an operator, on the GPU, as calls of one backend's kernel."""
    families = [family for family in FAMILIES if operator in family.OPERATORS]
    for family, dtype in itertools.product(families, backends.DTYPES):
        if backends.obstacle(operator, backend, "cuda", dtype) is None:
            kernel = backends.kernel(operator, "cuda", dtype, backend)
            for case in family.cases(operator, dtype):
                yield partial(kernel, *case.on("cuda").arguments)


def _run_all(operator: str, backend: str) -> None:
    for call in _calls(operator, backend):
        call()


def _verify(file: Path) -> int:
    passed: dict[tuple[str, str], bool] = {}
    failures: list[str] = []
    by_operator: dict[tuple[str, str], list[dict[str, Any]]] = {}
    try:
        for outcome in verify():
            if outcome.device_type != "cuda" or outcome.backend == "reference":
                continue
            key = (outcome.operator, outcome.backend)
            passed[key] = passed.get(key, True) and outcome.passed
            if not outcome.passed:
                failures.append(f"{outcome.operator} {outcome.backend} {outcome.dtype}: {outcome.failure}")
        for operator, backend in passed:
            by_operator[backend, operator] = totals(launches(partial(_run_all, operator, backend)))
    except Exception:  # what is known until here is still worth writing down
        failures.append(f"stopped\n{traceback.format_exc()}")
    verified = [{"operator": operator, "backend": backend} for (operator, backend), ok in passed.items() if ok]
    content = {"verified": verified, "failures": failures, "kernels": merged(by_operator)}
    file.write_text(json.dumps(content))
    print("\n".join(failures) or f"{len(verified)} operators verified")
    return 1 if failures or not verified else 0


def _tests(file: Path) -> int:
    import pytest

    status: list[int] = []
    found = launches(lambda: status.append(int(pytest.main(list(sanitizer.TESTS)))))
    file.write_text(json.dumps({"kernels": sorted({kernel for kernel, _ in found})}))
    return status[0]


def _layer_step() -> Callable[[], None]:
    """Forward and backward of one layer, all kernels in CUDA C++."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, fan_in: int = 1) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return values / fan_in**0.5

    x, weight, dy = normal(M, K).requires_grad_(), normal(N, K, fan_in=K), normal(M, N)
    lora_a, lora_b = normal(RANK, K, fan_in=K).requires_grad_(), normal(N, RANK, fan_in=RANK).requires_grad_()

    def step() -> None:
        with peft_kernels.use_backend("cuda"):
            y = peft_kernels.ops.lora_linear(x, weight, None, lora_a, lora_b, 2.0, 0.0, True)
        torch.autograd.grad(y, (x, lora_a, lora_b), dy)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    return step


def _layer(file: Path) -> int:
    step = _layer_step()
    rows = totals(launches(lambda: [step() for _ in range(STEPS)]))
    for row in rows:  # of one step
        row["launches"] /= STEPS
        row["microseconds"] = round(row["microseconds"] / STEPS, 2)
        print(f"{row['microseconds']:10.1f} us  {row['kernel']}")
    file.write_text(json.dumps({"slowest": rows}))
    return 0 if rows else 1


def _step() -> int:
    step = _layer_step()
    torch.cuda.profiler.start()
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs one workload."""
    name, *files = argv
    if name == "step":
        return _step()
    return {"verify": _verify, "tests": _tests, "layer": _layer}[name](*map(Path, files))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
