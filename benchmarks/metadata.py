"""Where, when and from which source a figure was taken."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "triton", "peft", "transformers", "accelerate", "numpy")
_CPU_FEATURES = (
    *("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("asimd", "bf16", "sve", "i8mm"),
)
_NOT_SOURCE = (":!benchmarks/results", ":!README.md", ":!docs")
"""Written from measurements: changing them does not make a measurement's source dirty."""


def now() -> str:
    """The present time, UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def commit() -> dict[str, Any]:
    """The commit of this source tree and whether the tree differs from it; both None where nothing tells.

    A tree that was copied without its history has no git to ask; whoever copied it can say so in the environment:
    `PEFT_KERNELS_COMMIT=$(git describe --always --abbrev=40 --exclude '*' --dirty)`.
    """
    head = _git("rev-parse", "HEAD")
    changes = None if head is None else _git("status", "--porcelain", "--", ".", *_NOT_SOURCE)
    if head is not None and changes is not None:
        return {"commit": head, "dirty": bool(changes)}
    stated = os.environ.get("PEFT_KERNELS_COMMIT", "")
    if not re.fullmatch(r"[0-9a-f]{40}(-dirty)?", stated):
        return {"commit": None, "dirty": None}
    return {"commit": stated[:40], "dirty": stated.endswith("-dirty")}


def package_versions() -> dict[str, str | None]:
    """Versions of what a figure depends on; None where a package is not installed."""
    import peft_kernels

    versions: dict[str, str | None] = {"python": platform.python_version(), "peft_kernels": peft_kernels.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _cpu_info() -> tuple[str, list[str]]:
    """Model name and the vector and matrix features among its flags."""
    name, flags = platform.processor() or platform.machine(), set()
    path = Path("/proc/cpuinfo")
    if path.exists():
        text = path.read_text()
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        name = found.group(1).strip() if found else name
        line = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
        flags = set(line.group(1).split()) if line else set()
    return name, [feature for feature in _CPU_FEATURES if feature in flags]


def system(device: torch.device) -> dict[str, Any]:
    """The machine: CPU, threads, load, and the GPU when that is what was measured."""
    name, features = _cpu_info()
    info: dict[str, Any] = {
        "device": device.type,
        "cpu": name,
        "cpu_features": features,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info["gpu"] = {
            "name": properties.name,
            "architecture": f"sm_{properties.major}{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    return info


def slug(device: torch.device) -> str:
    """A directory name for this device: the GPU's name, or the CPU's with the number of threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_info()[0]
    name = re.sub(r"\((r|tm|c)\)", "", name.lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return name if device.type == "cuda" else f"{name}-{torch.get_num_threads()}-threads"


def command() -> str:
    """The command line that is running, as it can be typed again."""
    return " ".join(["python -m benchmarks", *sys.argv[1:]])
