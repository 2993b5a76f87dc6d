"""Interrupted and resumed runs: the same curve, the same bits, and clear refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from .conftest import TINY, Invoke
from .test_finetune import base_model, losses

RUN = [*TINY, "--lora-dropout", "0.1", "--compare", "peft", "--sample-tokens", "0"]


def tensors_of(output: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, adapters and optimizers of both arms."""
    files = sorted(output.glob("checkpoints/step-*/*.safetensors"))
    assert len(files) == 4
    return {f"{path.name}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


def assert_same_run(actual: Path, expected: Path) -> None:
    """Raises unless both runs have the same losses and end in the same bits."""
    for arm in ("peft-kernels", "PEFT"):
        assert losses(actual, arm) == losses(expected, arm)
    ours, theirs = tensors_of(actual), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(invoke: Invoke, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps."""
    output = tmp_path_factory.mktemp("resume") / "run"
    result = invoke("finetune", *RUN, "--steps", 6, "--output", output)
    assert result.exit_code == 0, result.output
    return output


def test_resuming_continues_the_same_curve_exactly(uninterrupted: Path, invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert invoke("finetune", *RUN, "--steps", 2, "--output", output).exit_code == 0
    result = invoke("finetune", "--resume", "--steps", 6, "--output", output)
    assert result.exit_code == 0, result.output
    assert "Resuming after step 2 of 6" in result.output
    assert_same_run(output, uninterrupted)


def command(output: Path, *options: object) -> subprocess.Popen:
    """The command line in a process of its own, as a shell would start it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    arguments = [sys.executable, "-m", "peft_kernels.cli", "finetune", *map(str, options), "--output", str(output)]
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        arguments, cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_ctrl_c_leaves_a_loadable_adapter_and_a_resumable_run(invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = command(output, *RUN, "--steps", 100_000, "--save-every", 3)
    deadline = time.monotonic() + 120
    while not (output / "checkpoints").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Stopped after step" in shown and "--resume --output" in shown
    assert "Traceback" not in errors

    PeftModel.from_pretrained(base_model(), output / "adapter")
    (checkpoint,) = (output / "checkpoints").iterdir()
    finished = int(checkpoint.name.removeprefix("step-"))
    result = invoke("finetune", "--resume", "--steps", finished + 2, "--output", output)
    assert result.exit_code == 0, result.output
    straight = tmp_path / "straight"
    assert invoke("finetune", *RUN, "--steps", finished + 2, "--output", straight).exit_code == 0
    assert_same_run(output, straight)


@pytest.mark.parametrize(
    ("option", "value", "saved"),
    [("--r", 8, 16), ("--seed", 1, 0), ("--compare", "none", "peft"), ("--seq-len", 16, 32), ("--lr", 0.1, 0.003)],
)
def test_a_changed_option_is_refused_by_name(
    option: str, value: object, saved: object, uninterrupted: Path, invoke: Invoke
) -> None:
    result = invoke("finetune", "--resume", option, value, "--output", uninterrupted)
    assert result.exit_code == 2
    assert f"Error: {option} {value}: the run was started with {option} {saved}" in result.stderr


def test_steps_may_not_change_under_a_schedule_that_depends_on_them(invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = [*TINY, "--sample-tokens", 0, "--lr-schedule", "linear", "--output", output]
    assert invoke("finetune", *options, "--steps", 1).exit_code == 0
    result = invoke("finetune", "--resume", "--steps", 2, "--output", output)
    assert result.exit_code == 2
    assert "--steps 2: the run was started with --steps 1 and --lr-schedule linear" in result.stderr


def test_changed_data_are_refused(invoke: Invoke, tmp_path: Path) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("one two three four " * 100)
    options = [*TINY, "--sample-tokens", 0, "--data", text, "--output", output]
    assert invoke("finetune", *options, "--steps", 1).exit_code == 0
    text.write_text("one two three five " * 100)
    result = invoke("finetune", "--resume", "--steps", 2, "--output", output)
    assert result.exit_code == 2
    assert f"--data: the text in {text} is not what the first 1 steps" in result.stderr


def test_resuming_nothing_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("finetune", "--resume", "--output", tmp_path)
    assert result.exit_code == 2
    assert f"--resume: {tmp_path} holds no checkpoint" in result.stderr


def test_an_earlier_run_is_not_replaced_unasked(uninterrupted: Path, invoke: Invoke) -> None:
    before = (uninterrupted / "metrics.json").read_bytes()
    result = invoke("finetune", *RUN, "--steps", 1, "--output", uninterrupted)
    assert result.exit_code == 2
    assert "holds an earlier run" in result.stderr and "--overwrite" in result.stderr
    assert (uninterrupted / "metrics.json").read_bytes() == before


def test_overwrite_replaces_an_earlier_run(invoke: Invoke, tmp_path: Path) -> None:
    options = [*TINY, "--sample-tokens", 0, "--output", tmp_path / "run"]
    assert invoke("finetune", *options, "--steps", 2).exit_code == 0
    assert invoke("finetune", *options, "--steps", 1, "--overwrite").exit_code == 0
    assert len(losses(tmp_path / "run")) == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_torn_checkpoint_is_passed_over(uninterrupted: Path, invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert invoke("finetune", *TINY, "--sample-tokens", 0, "--steps", 1, "--output", output).exit_code == 0
    torn = output / "checkpoints" / "step-00000009.partial"
    torn.mkdir()
    (torn / "state.json").write_text("{")
    result = invoke("finetune", "--resume", "--steps", 2, "--output", output)
    assert result.exit_code == 0, result.output
    assert len(losses(output)) == 2
