"""Where the Triton kernels run: in Triton's interpreter on CPU tensors, or on a GPU.

Triton decides at import which it is, so the interpreted tests take a process of their own:
`TRITON_INTERPRET=1 python -m pytest tests/triton`. Elsewhere they run on a GPU, bfloat16 included, or are skipped.
The interpreter takes about half a millisecond per program, so shapes are small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_kernels.triton_kernels import common
from peft_kernels.triton_kernels.common import INTERPRETING

from ..support.places import Place

RUNNABLE = INTERPRETING or torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16) if INTERPRETING else (torch.float32, torch.float16, torch.bfloat16)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks this directory's tests: `gpu` where they need one, skipped where there is none."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and not INTERPRETING:
            item.add_marker(pytest.mark.gpu)
            if not RUNNABLE:
                item.add_marker(pytest.mark.skip(reason="needs a GPU, or TRITON_INTERPRET=1 in a process of its own"))


@pytest.fixture(scope="session")
def place() -> Place:
    """The Triton backend on the device that it has here."""
    return Place("cpu" if INTERPRETING else "cuda", "triton")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every activation dtype that works here; the interpreter's bfloat16 arithmetic does not."""
    return request.param


@pytest.fixture(params=[dtype for dtype in DTYPES if dtype.itemsize == 2], ids=lambda d: str(d).removeprefix("torch."))
def half(request: pytest.FixtureRequest) -> torch.dtype:
    """The 16-bit dtypes among them."""
    return request.param


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """The (kernel name, grid) of every launch since the test began."""
    launches = []
    original = common.launch

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launches.append((kernel.__name__, grid))
        original(kernel, grid, *arguments, **options)

    monkeypatch.setattr(common, "launch", record)
    return launches
