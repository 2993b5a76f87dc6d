"""`finetune --method sparse_delta`: alone, beside PEFT's SHiRA, interrupted and resumed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import peft_kernels as pk
from peft_kernels.training import finetune

from .conftest import TINY, Invoke
from .test_finetune import base_model, losses

SPARSE = [*TINY, "--method", "sparse_delta", "--sample-tokens", "0"]
MOVING = [*SPARSE, "--density", "0.02", "--reselection-steps", "4", "--selection-accumulation-steps", "3"]


def metrics(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def test_a_fixed_mask_follows_shiras_loss_curve(invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = ["--compare", "shira", "--selection", "fixed", "--r", 2, "--steps", 5]
    result = invoke("finetune", *SPARSE, *options, "--output", output)
    assert result.exit_code == 0, result.output
    assert losses(output, "peft-kernels") == pytest.approx(losses(output, "PEFT SHiRA"), rel=1e-5)
    assert metrics(output)["largest_relative_loss_difference"] < 1e-5
    assert "Ratio: peft-kernels over PEFT SHiRA." in " ".join(result.output.split())


@pytest.mark.parametrize("selection", ["rigl", "sm3", "random", "magnitude"])
def test_a_run_stopped_within_a_window_continues_to_the_same_bits(
    selection: str, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    options = [*MOVING, "--selection", selection, "--steps", 9, "--save-every", 100]
    assert invoke("finetune", *options, "--output", whole).exit_code == 0

    update = finetune.TrainingDisplay.update

    def stop_after_five(self: Any, finished: int) -> None:
        update(self, finished)
        if finished == 5:  # the window over steps 5 to 7 is open
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(finetune.TrainingDisplay, "update", stop_after_five)
    assert invoke("finetune", *options, "--output", halved).exit_code == 130
    monkeypatch.undo()
    result = invoke("finetune", "--resume", "--output", halved)
    assert result.exit_code == 0, result.output
    assert "Resuming after step 5 of 9" in result.output

    assert losses(halved, "peft-kernels") == losses(whole, "peft-kernels")
    for name in ("adapter", "optimizer", "reselection"):
        (first,) = whole.glob(f"checkpoints/step-*/peft-kernels.{name}.safetensors")
        (second,) = halved.glob(f"checkpoints/step-*/peft-kernels.{name}.safetensors")
        expected, found = load_file(first), load_file(second)
        assert expected.keys() == found.keys()
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_the_written_adapter_loads_here_and_in_peft(invoke: Invoke, tmp_path: Path) -> None:
    from peft import PeftModel

    output = tmp_path / "run"
    assert invoke("finetune", *MOVING, "--steps", 4, "--output", output).exit_code == 0
    ours, tokens = base_model(), torch.arange(12)[None]
    plain = ours(input_ids=tokens).logits
    pk.load_adapter(ours, output / "adapter")
    logits = ours(input_ids=tokens).logits
    assert not torch.equal(logits, plain)
    theirs = PeftModel.from_pretrained(base_model(), output / "adapter")
    assert torch.allclose(theirs(input_ids=tokens).logits, logits, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compare", "shira"], "--compare shira goes with --method sparse_delta; this run has lora"),
        (["--density", "0.1"], "--density belongs to --method sparse_delta; this run has --method lora"),
        (["--method", "sparse_delta", "--lora-dropout", "0.1"], "--lora-dropout belongs to --method lora"),
        (["--method", "sparse_delta", "--compare", "peft"], "--compare peft goes with --method lora"),
        (["--method", "sparse_delta", "--density", "1.5"], "--density must be in (0, 1], got 1.5"),
        (["--method", "sparse_delta", "--density", "0.1", "--compare", "shira"], "SHiRA counts by rank"),
        (["--method", "sparse_delta", "--reselection-steps", "2"], "must be at most --reselection-steps, 2, got 5"),
        (["--method", "sparse_delta", "--reselection-rate", "2"], "--reselection-rate must be in [0, 1], got 2.0"),
        (["--method", "sparse_delta", "--selection", "best"], "--selection must be one of rigl, sm3"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], message: str, invoke: Invoke, tmp_path: Path
) -> None:
    result = invoke("finetune", *TINY, *options, "--steps", 1, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "run").exists()


def test_reselection_rates_forbid_another_number_of_steps(invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert invoke("finetune", *MOVING, "--steps", 3, "--output", output).exit_code == 0
    result = invoke("finetune", "--resume", "--steps", 5, "--output", output)
    assert result.exit_code == 2
    assert "--selection rigl, whose reselection rates depend on it" in result.output


def test_overwrite_keeps_the_earlier_run_until_the_new_one_can_begin(invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert invoke("finetune", *MOVING, "--steps", 1, "--output", output).exit_code == 0
    result = invoke("finetune", *MOVING, "--model", "/no/such/model", "--overwrite", "--output", output)
    assert result.exit_code == 2
    assert (output / "adapter").is_dir() and (output / "metrics.json").is_file()
