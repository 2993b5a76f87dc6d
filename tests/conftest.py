"""What holds for every test: NaN in fresh memory, a fixed seed, two threads, hypothesis settings.

With PEFT_KERNELS_SIMULATE=1 the CUDA kernels, executed on the CPU, serve the backend `cuda` of CPU tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

# cuBLAS is deterministic only with a fixed workspace; it reads this when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

try:
    from hypothesis import settings
except ModuleNotFoundError:  # a GPU machine without a network; what needs a GPU does without hypothesis
    collect_ignore = [
        "build/test_philox_host.py",
        "lora/test_properties.py",
        "sparse_delta/test_config.py",
        "sparse_delta/test_properties.py",
    ]
else:
    settings.register_profile("default", deadline=None, max_examples=25)
    settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, print_blob=True)
    settings.load_profile("ci" if os.environ.get("CI") else "default")


if os.environ.get("PEFT_KERNELS_SIMULATE") == "1":  # before tests are generated for the places of this machine
    from .simt.operators import register_simulated

    register_simulated()


@pytest.fixture(scope="session", autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """`torch.empty` hands out NaN (integers: the largest value), in Python and under every C++ operator.

    A kernel that leaves part of its result unwritten, or reads scratch memory before it wrote it, then shows. This is
    torch's deterministic mode; where an operator of torch's own has no deterministic version it warns and runs.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill_before
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
