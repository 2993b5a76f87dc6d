"""How these tests call the command line: in this process, on a tiny random model, one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from peft_kernels.cli import app

TINY = ["--model", "random:llama-tiny", "--dtype", "float32", "--seq-len", "32", "--sample-tokens", "4", "--lr", "3e-3"]
"""Options of a run that takes about a second."""

Invoke = Callable[..., Any]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def invoke() -> Invoke:
    """Calls `peft-kernels` with arguments; an exception that the command line does not handle fails the test."""

    def call(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)

    return call


@pytest.fixture(scope="session")
def compared_run(invoke: Invoke, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a finished run with `--compare peft`."""
    output = tmp_path_factory.mktemp("compared") / "run"
    result = invoke("finetune", *TINY, "--steps", 4, "--compare", "peft", "--output", output)
    assert result.exit_code == 0, result.output
    (output / "terminal.txt").write_text(result.output)
    return output
