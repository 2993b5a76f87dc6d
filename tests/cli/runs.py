"""What tests of several methods do with runs: stop one, and compare two bit by bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peft_kernels.training import finetune


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the next run get a SIGTERM when it has made so many steps; `monkeypatch.undo` ends that."""
    update = finetune.TrainingDisplay.update

    def update_and_stop(self: Any, finished: int) -> None:
        update(self, finished)
        if finished == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(finetune.TrainingDisplay, "update", update_and_stop)


def losses_of(output: Path) -> dict[str, list[float]]:
    """By arm, the loss of every step."""
    arms = json.loads((output / "metrics.json").read_text())["arms"]
    return {name: [step["loss"] for step in arm["steps"]] for name, arm in arms.items()}


def state_of(output: Path) -> dict[str, Any]:
    """`state.json` of the newest checkpoint."""
    (path,) = output.glob("checkpoints/step-*/state.json")
    return json.loads(path.read_text())


def tensors_of(output: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint and of the result, by file and name."""
    files = [*output.glob("checkpoints/step-*/*.safetensors"), *output.glob("adapter/*.safetensors")]
    files += output.glob("model/*.safetensors")
    return {f"{path.name}/{name}": value for path in sorted(files) for name, value in load_file(path).items()}


def assert_same_run(actual: Path, expected: Path) -> None:
    """Raises unless both runs have the same losses and schedules, and end in the same bits."""
    assert losses_of(actual) == losses_of(expected)
    assert state_of(actual)["schedules"] == state_of(expected)["schedules"]
    first, second = tensors_of(actual), tensors_of(expected)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
