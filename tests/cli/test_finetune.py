"""A run from start to report, alone and side by side with PEFT's layers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import peft_kernels as pk
from peft_kernels.training.models import load_model

from .conftest import TINY, Invoke


def base_model() -> torch.nn.Module:
    """The model that a `TINY` run with seed 0 starts from."""
    torch.manual_seed(0)
    return load_model("random:llama-tiny", torch.float32, torch.device("cpu")).model.eval()


def metrics(output: Path) -> dict:
    """What the run wrote down."""
    return json.loads((output / "metrics.json").read_text())


def losses(output: Path, arm: str = "peft-kernels") -> list[float]:
    """The loss curve of one arm."""
    return [step["loss"] for step in metrics(output)["arms"][arm]["steps"]]


def test_everything_lies_under_output(compared_run: Path) -> None:
    names = {path.name for path in compared_run.iterdir()}
    assert {"adapter", "checkpoints", "metrics.json", "report.html", "loss.png", "step_time.png"} <= names
    for picture in ("loss.png", "step_time.png"):
        assert (compared_run / picture).read_bytes().startswith(b"\x89PNG")


def test_both_arms_follow_one_loss_curve(compared_run: Path) -> None:
    ours, theirs = losses(compared_run), losses(compared_run, "PEFT")
    assert len(ours) == len(theirs) == 4
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert len(set(ours)) == 4


def test_terminal_shows_the_table(compared_run: Path) -> None:
    shown = (compared_run / "terminal.txt").read_text()
    for label in ("tokens per second", "seconds per step", "peak memory", "final training loss", "held-out loss"):
        line = next(line for line in shown.splitlines() if line.strip().startswith(label))
        assert re.search(r"[\d.,]+ +[\d.,]+ +\d+\.\d{3}", line), line
    assert "text sample before training" in shown and "text sample after training" in shown


def test_ratios_are_ours_over_theirs(compared_run: Path) -> None:
    arms = metrics(compared_run)["arms"]
    expected = arms["peft-kernels"]["summary"]["seconds_per_step"] / arms["PEFT"]["summary"]["seconds_per_step"]
    shown = (compared_run / "terminal.txt").read_text()
    line = next(line for line in shown.splitlines() if "seconds per step" in line)
    assert float(line.split()[-1]) == pytest.approx(expected, abs=6e-4)


def test_our_step_holds_less_memory_than_pefts(compared_run: Path) -> None:
    arms = metrics(compared_run)["arms"]
    assert 0 < arms["peft-kernels"]["summary"]["peak_bytes"] < arms["PEFT"]["summary"]["peak_bytes"]


def test_report_stands_alone(compared_run: Path) -> None:
    page = (compared_run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "http" not in page
    assert "{{" not in page and "{%" not in page


def test_text_from_the_model_is_escaped_in_the_report(invoke: Invoke, tmp_path: Path) -> None:
    prompt = "<script>alert(1)</script>"
    result = invoke("finetune", *TINY, "--steps", 1, "--prompt", prompt, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "run" / "report.html").read_text()
    assert "&lt;script&gt;" in page and "<script>" not in page


def test_peft_loads_the_adapter_with_equal_logits(compared_run: Path) -> None:
    ours, tokens = base_model(), torch.arange(40).view(2, 20)
    base_logits = ours(tokens).logits
    pk.load_adapter(ours, compared_run / "adapter")
    theirs = PeftModel.from_pretrained(base_model(), compared_run / "adapter").eval()
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens).logits, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(base_logits, expected, atol=1e-3)


def test_peft_evaluates_the_written_adapter_in_the_run(compared_run: Path) -> None:
    record = metrics(compared_run)
    expected = record["arms"]["peft-kernels"]["summary"]["held_out_loss"]
    assert record["held_out_loss_of_written_adapter_in_peft"] == pytest.approx(expected, rel=1e-6)


def test_training_alone_writes_the_same_adapter(compared_run: Path, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("finetune", *TINY, "--steps", 4, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert losses(tmp_path / "run") == losses(compared_run)
    alone = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    together = load_file(compared_run / "adapter" / "adapter_model.safetensors")
    assert alone.keys() == together.keys()
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_options_reach_the_adapter(invoke: Invoke, tmp_path: Path) -> None:
    options = ["--r", 3, "--lora-alpha", 5, "--lora-dropout", 0.25, "--target-modules", "q_proj, down_proj"]
    options += ["--use-rslora", "--gradient-checkpointing", "--gradient-accumulation", 2, "--lr-schedule", "cosine"]
    result = invoke("finetune", *TINY, *options, "--steps", 3, "--compare", "peft", "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["use_rslora"]) == (3, 5, 0.25, True)
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(("choice", "expected"), [("float32", torch.float32), ("model", torch.bfloat16)])
def test_adapter_dtype_is_the_one_asked_for_in_both_arms(
    choice: str, expected: torch.dtype, invoke: Invoke, tmp_path: Path
) -> None:
    options = [*TINY, "--dtype", "bfloat16", "--adapter-dtype", choice, "--steps", 1, "--compare", "peft"]
    result = invoke("finetune", *options, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    for path in (tmp_path / "run").glob("checkpoints/*/*.adapter.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {expected}, path
