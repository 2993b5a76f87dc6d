"""`finetune --sampled-gradient`: beside a dense run, stopped and continued, refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import TINY, Invoke
from .runs import assert_same_run, losses_of, stop_after
from .test_finetune import metrics

SAMPLED = [*TINY, "--sample-tokens", "0", "--sampled-gradient", "0.3"]


def test_a_dense_run_of_the_same_adapter_goes_beside(invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = invoke("finetune", *SAMPLED, "--compare", "dense", "--steps", 3, "--output", output)
    assert result.exit_code == 0, result.output
    ours, dense = losses_of(output)["peft-kernels"], losses_of(output)["peft-kernels dense"]
    assert ours[0] == dense[0]  # before the first step nothing has been sampled
    # Then B alone has moved, whose gradient is exact.
    assert ours[1] == dense[1] and ours[2] != dense[2]
    record = metrics(output)
    assert record["settings"]["sampled_gradient"] == 0.3
    summaries = {name: arm["summary"] for name, arm in record["arms"].items()}
    assert summaries["peft-kernels"]["peak_bytes"] < summaries["peft-kernels dense"]["peak_bytes"]
    flat = " ".join(result.output.split())
    assert "adapter layers kept 0.3 of the rows of their inputs" in flat
    assert "the other without sampling gradients" in flat


def test_a_stopped_run_continues_to_the_same_bits(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    options = [*SAMPLED, "--lora-dropout", "0.1", "--gradient-checkpointing", "--steps", "3", "--save-every", "2"]
    assert invoke("finetune", *options, "--output", whole).exit_code == 0
    stop_after(2, monkeypatch)
    assert invoke("finetune", *options, "--output", halved).exit_code == 130
    monkeypatch.undo()
    result = invoke("finetune", "--resume", "--output", halved)
    assert result.exit_code == 0, result.output
    assert_same_run(halved, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sampled-gradient", "0"], "--sampled-gradient must be in (0, 1], got 0.0"),
        (["--sampled-gradient", "1.5"], "--sampled-gradient must be in (0, 1], got 1.5"),
        (["--sampled-gradient", "nan"], "--sampled-gradient must be in (0, 1], got nan"),
        (["--sampled-gradient", "0.3", "--method", "s2ft"], "--sampled-gradient belongs to --method lora"),
        (
            ["--compare", "dense"],
            "--compare dense needs --token-elimination, --token-tune, --loss-ratio or --sampled-gradient",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], message: str, invoke: Invoke, tmp_path: Path
) -> None:
    result = invoke("finetune", *TINY, *options, "--steps", 1, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
