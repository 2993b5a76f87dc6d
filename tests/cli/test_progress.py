"""What is on screen while a run goes on."""

from __future__ import annotations

import io
import re

import torch
from rich.console import Console
from torch import nn

from peft_kernels.training.arms import OURS, PEFT, Arm, StepRecord
from peft_kernels.training.progress import TrainingDisplay
from peft_kernels.training.settings import Settings


def shown(is_terminal: bool, steps: int = 3) -> str:
    """The output of a run of 512 tokens and half a second per step, colors removed."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=is_terminal, width=80)
    arms = []
    for name in (OURS, PEFT):
        weight = nn.Parameter(torch.zeros(1))
        arms.append(Arm(name, nn.Identity(), {"weight": weight}, torch.optim.SGD([weight])))
    display = TrainingDisplay(console, arms, Settings(steps=steps, batch_size=2, seq_len=256))
    with display.running():
        for step in range(steps):
            for arm in arms:
                arm.history.append(StepRecord(step, 2.5 - step, 0.5, True))
            display.update(step + 1)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())


def test_a_terminal_gets_a_bar_with_loss_and_speed_for_every_arm() -> None:
    for name in (OURS, PEFT):
        assert re.search(rf"{name} +━+ 3/3 loss 0\.5000, 1,024 tokens/s", shown(is_terminal=True))


def test_a_file_gets_lines_without_control_characters() -> None:
    lines = shown(is_terminal=False).splitlines()
    assert lines[0] == "step 1/3  peft-kernels: loss 2.5000, 1,024 tokens/s  |  PEFT: loss 2.5000, 1,024 tokens/s"
    assert len(lines) == 3


def test_a_long_run_writes_about_ten_lines() -> None:
    assert len(shown(is_terminal=False, steps=100).splitlines()) == 11
