"""The executor and the libraries of kernels that run in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from . import build

PRODUCTS = build.HERE / "kernels" / "products.cu"
CASES = tuple(sorted(set((build.HERE / "kernels").glob("*.cu")) - {PRODUCTS}))


@pytest.fixture(scope="session")
def cases() -> Any:
    """The operators of tests/simt/kernels. A build that fails, fails the tests."""
    if build.compiler() is None:
        pytest.skip("no g++, which the executor needs to compile kernels for the CPU")
    build.load(CASES, "cases")
    return torch.ops.peft_kernels_simt


@pytest.fixture(autouse=True)
def first_seed() -> Iterator[None]:
    """Every test starts with the same order of blocks and threads, which PK_SIMT_SEED may choose."""
    if build.compiler() is not None:
        build.set_seed(int(os.environ.get("PK_SIMT_SEED", "0"), 0))
    yield
