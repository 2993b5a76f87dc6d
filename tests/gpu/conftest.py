"""What holds for the CUDA tests: a marker for those that run under compute-sanitizer, and fresh memory that it can see.

Under a tool of compute-sanitizer, PEFT_KERNELS_SANITIZER names the tool (benchmarks/gpu_check/sanitizer.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker."""
    config.addinivalue_line("markers", "sanitizer: runs under every tool of compute-sanitizer; together, every kernel")


@pytest.fixture(autouse=True)
def initcheck_sees_fresh_memory() -> Iterator[None]:
    """NaN in fresh memory would count as written."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    if os.environ.get("PEFT_KERNELS_SANITIZER") == "initcheck":
        torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
