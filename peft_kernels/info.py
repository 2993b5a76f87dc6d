"""What `peft-kernels info` prints, for bug reports: versions, hardware, libraries, and which backend serves what."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING, Any

import torch

from . import __version__, backends, libraries

if TYPE_CHECKING:
    from rich.console import Console

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Package name to version, `"not installed"` where it is missing."""
    found = {"peft-kernels": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["torch"] = torch.__version__  # with the build's suffix
    found["torch CUDA"] = torch.version.cuda or "none (CPU build)"
    return found


def machine() -> dict[str, Any]:
    """System, processor with its features, and GPUs."""
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": properties.name,
                    "architecture": f"sm_{properties.major}{properties.minor}",
                    "memory_GiB": round(properties.total_memory / 2**30, 1),
                }
            )
    return {
        "system": platform.platform(),
        "cpu": _processor_name(),
        "threads": torch.get_num_threads(),
        "cpu_features": _cpu_features(),
        "gpus": gpus,
    }


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cpu_features() -> dict[str, bool] | None:
    """Feature name to whether the processor has it; None when `_host`, which asks it, is not built."""
    return None if libraries.host is None else dict(libraries.host.cpu_features())


def gather() -> dict[str, Any]:
    """Everything as plain values."""
    rows = backends.backend_report().rows
    return {
        "versions": versions(),
        "machine": machine(),
        "build": None if libraries.host is None else libraries.host.build_info,
        "libraries": {name: reason or "loaded" for name, reason in libraries.missing.items()},
        "backends": [
            {
                "operator": row.operator,
                "device": row.device_type,
                "dtype": str(row.dtype).removeprefix("torch."),
                "backend": row.backend,
                "passed_over": row.passed_over,
            }
            for row in rows
        ],
    }


def device_description(device: torch.device) -> str:
    """The processor or GPU that `device` is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor_name()}, {torch.get_num_threads()} threads"


def print_info(console: Console) -> None:
    """Prints `gather()` for people."""
    found = gather()
    _section(console, "Versions", found["versions"])
    hardware = found["machine"]
    features = hardware["cpu_features"]
    if features is None:
        feature_text = "unknown, because _host is missing (see below)"
    else:
        present = [name for name, is_present in features.items() if is_present]
        feature_text = ", ".join(present) if present else "none of " + ", ".join(features)
    gpus = [f"{gpu['name']}, {gpu['architecture']}, {gpu['memory_GiB']} GiB" for gpu in hardware["gpus"]]
    _section(
        console,
        "Machine",
        {
            "system": hardware["system"],
            "cpu": f"{hardware['cpu']}, {hardware['threads']} threads",
            "cpu features": feature_text,
            "gpus": "; ".join(gpus) or "none that torch sees",
        },
    )
    _section(console, "Libraries", {**found["libraries"], "build": found["build"] or "unknown"})
    _print_backends(console, found["backends"])


def _section(console: Console, title: str, values: dict[str, str]) -> None:
    console.print(title, style="bold")
    for name, value in values.items():
        console.print(f"  {name:<14} {value}", highlight=False, markup=False, soft_wrap=True)
    console.print()


def _print_backends(console: Console, rows: list[dict[str, Any]]) -> None:
    """One block per device and distinct answer: operators and dtypes that share backend and reasons stand together."""
    groups: dict[tuple[str, str, str, tuple[tuple[str, str], ...]], list[str]] = {}
    for row in rows:
        # An operator's own name in a reason would keep equal reasons apart.
        reasons = {name: reason.replace(row["operator"], "it") for name, reason in row["passed_over"].items()}
        key = (row["operator"], row["device"], row["backend"], tuple(reasons.items()))
        groups.setdefault(key, []).append(row["dtype"])
    merged: dict[tuple[Any, ...], list[str]] = {}
    for (operator, device, backend, reasons_of), dtypes in groups.items():
        merged.setdefault((device, backend, tuple(dtypes), reasons_of), []).append(operator)
    console.print("Backends", style="bold")
    for (device, backend, dtypes_of, reasons_of), operators in merged.items():
        head = f"  on {device}, {', '.join(dtypes_of)}: {backend}"
        console.print(head, highlight=False, style="green", soft_wrap=True)
        console.print(f"    serves {', '.join(operators)}", highlight=False, soft_wrap=True)
        for name, reason in reasons_of:
            console.print(f"    not {name}: {reason}", highlight=False, markup=False, style="dim", soft_wrap=True)
